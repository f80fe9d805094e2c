"""The best path of a number sequence through a bit-shift trellis, tails biting: the encoder of trellis codes on CUDA."""
