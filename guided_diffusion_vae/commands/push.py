"""Upload an export with its model card to a repository of the Hugging Face hub.

    python scripts/export.py --model_path runs/diffusion --format diffusers --license mit --out exported/pipeline
    python scripts/push.py --export exported/pipeline --repo owner/name

A model without a card, or a card without a license, is not uploaded. `hf auth login` stores the token that is used."""

from .. import dist_util
from ..logger import log_rank0
from ..runs.cards import PushConfig, push
from ..runs.run import script


@script(__doc__, PushConfig)
def main(run):
    if dist_util.rank() == 0:
        log_rank0(f"uploaded {run[PushConfig].export} to {push(run[PushConfig])}")


create_argparser = main.argparser
