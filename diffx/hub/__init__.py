"""Models of ``transformers``: conversion, attention, and decoders as registered classes."""
