"""The same numbers, faster: nothing here is needed to understand the algorithm.

`policy` is where the update enters: microbatches (`accumulate`, `bundles`, `packing`) and chunks of
logits (`chunked_loss`). `decode` and `compaction` are the sampler's.
"""
