"""The real-language pair: SmolLM2-135M-Instruct that sees clips of moving shapes."""
