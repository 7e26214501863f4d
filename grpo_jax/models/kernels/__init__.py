"""Attention kernels and compiler work-arounds, one file for each platform.

`dispatch` is what the decoder calls. `selection` decides which form of attention a config gets on
which platform, `cpu` holds the work-arounds for XLA's CPU compiler, `splash` is the kernel for
TPUs, and `cudnn` and `decode_token` are those for NVIDIA GPUs.
"""
