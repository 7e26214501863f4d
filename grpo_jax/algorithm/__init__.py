"""The algorithm, in the order of the paper.

`config` (one options object), `advantages`, `losses`, `logprobs`, `sample` and `update` can be read
without opening `engine`, which computes the same numbers faster.
"""
