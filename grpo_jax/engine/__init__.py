"""The same numbers, faster: nothing here is needed to understand the algorithm.

The update calls `policy`, which combines microbatches (`accumulate`, `bundles`, `packing`) and
chunks of logits (`chunked_loss`). The sampler calls `decode` and `compaction`.
"""
