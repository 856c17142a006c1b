"""The mathematics of the recipe: pure functions on tensors, between the rewards and the optimizer.

Filters and advantages run after the rewards; weights, KL and the policy loss run inside the
training step; the pass@k statistics run in evaluation. No process group, no file, no Megatron: a
sum over context-parallel ranks, where one is needed, is handed in as a function.
"""
