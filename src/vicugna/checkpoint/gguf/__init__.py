"""GGUF, llama.cpp's file of weights, hyperparameters and tokenizer in one."""
