"""One of several processes: loads its share of a model from rank files and from whole ones, and saves it again.

Arguments: the folder of rank files, the folder of the whole weights, where to save.
"""

import sys
from pathlib import Path

import paddle.distributed as dist
from paddle.distributed import fleet
from safetensors.numpy import save_file

from modernbert_align.backends.gloo import give_groups_own_stores
from modernbert_align.models.modernbert import ModernBertForMaskedLM


def main() -> None:
    """Load twice and save what was loaded as arrays, and as PaddleNLP saves it, once in each of its formats."""
    divided, whole, out = sys.argv[1:]
    give_groups_own_stores()
    degree = dist.get_world_size()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": degree, "pp_degree": 1, "sharding_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    rank = dist.get_rank()  # in the names of folders, as PaddleNLP writes config.json on all ranks at once
    for name, folder in (("from_ranks", divided), ("from_whole", whole)):
        model = ModernBertForMaskedLM.from_pretrained(folder, tensor_parallel_degree=degree, tensor_parallel_rank=rank)
        save_file({key: value.numpy() for key, value in model.state_dict().items()}, Path(out, f"{name}{rank}"))
        if name == "from_ranks":
            model.save_pretrained(str(Path(out, f"safetensors{rank}")), safe_serialization=True)
            model.save_pretrained(str(Path(out, f"pickles{rank}")))


if __name__ == "__main__":
    main()
