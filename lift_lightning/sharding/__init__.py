"""One view of a parameter under every way of distributing it, and all communication between ranks.

The only room that knows torch.distributed. Whatever the strategy, a rank owns one contiguous flat range of each
parameter: all of it on a single device and under DDP, some rows of it under FSDP2, any range of it under FSDP1.
"""

from lift_lightning.sharding.owned import Owned, is_absent, local, note_flattened, owned, step_shape
from lift_lightning.sharding.ranks import Ranks, VectorSum, all_ranks, ranks_of, total_norm
from lift_lightning.sharding.whole import load_whole_states, read_parts, whole_optimizer_state, whole_weights
from lift_lightning.sharding.wrapping import allocate, flatten_model, fully_shard_model, has_flattened, is_flattened

__all__ = [
    "Owned",
    "Ranks",
    "VectorSum",
    "all_ranks",
    "allocate",
    "flatten_model",
    "fully_shard_model",
    "has_flattened",
    "is_absent",
    "is_flattened",
    "load_whole_states",
    "local",
    "note_flattened",
    "owned",
    "ranks_of",
    "read_parts",
    "step_shape",
    "total_norm",
    "whole_optimizer_state",
    "whole_weights",
]
