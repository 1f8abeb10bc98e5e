"""Surgery: units masked, sliced away, compensated for; the smaller model saved and loaded."""
