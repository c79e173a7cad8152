"""LoRA adapters, their exact merging, and files of them."""
