"""Surgery: masking, slicing and compensating removed units; saving and loading the smaller model."""
