"""The Hugging Face directory: a checkpoint as transformers, vLLM and llama.cpp know it."""
