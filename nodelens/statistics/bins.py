"""The bins in which sizes are counted: 64 per factor of two, from 1e-8 to 1e8."""

DROPPED = 17  # low bits of the 23-bit float32 mantissa that a bin ignores: 64 bins per factor of two
LOW = 0x322BCC77 >> DROPPED  # 1e-8
HIGH = 0x4CBEBC20 >> DROPPED  # 1e8
BINS = HIGH - LOW + 2  # the first bin counts values below 1e-8 as 0, the last also values above 1e8
OCTAVE = 1 << 23 - DROPPED  # bins per factor of two
