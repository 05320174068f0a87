"""`python -m vicugna`, as torchrun starts it: torchrun ... -m vicugna train RECIPE --stage S."""

from vicugna.cli import main

if __name__ == "__main__":
    main()
