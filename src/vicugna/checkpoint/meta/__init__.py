"""The files that Meta publishes its Llamas in."""
