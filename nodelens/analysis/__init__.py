"""What units are to each other, beyond a value each."""
