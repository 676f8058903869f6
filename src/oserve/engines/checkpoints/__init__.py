"""Model folders as vLLM reads them: written whole or not at all, and made from one another.

``tensors`` reads and writes safetensors files one tensor at a time, ``folder`` makes folders appear
complete, ``int8`` quantises a checkpoint, ``ggml`` reads Llama models from GGUF files, ``smollm2``
makes the model that is served by default. It knows no engines, and needs no torch.
"""
