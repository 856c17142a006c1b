"""The weights that a stage starts from: a checkpoint of an earlier stage, or any other that `convert` can read."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.errors import UserError
from megatron_r1.convert.load import load_into
from megatron_r1.convert.source import open_source
from megatron_r1.model.scalar_head import HEAD, RewardModel
from megatron_r1.train.frozen import FrozenModel

logger = logging.getLogger(__name__)


def load_start(path: Path, model: FrozenModel) -> None:
    """Load only the model's weights. Collective.

    path: a checkpoint that a training stage wrote, or a Hugging Face folder, or a torch_dist or legacy checkpoint that
    something else wrote; the latter are read through the conversion tables, each rank its own part. A reward model that
    starts from a language model keeps its own head. Raises UserError for weights of another model.
    """
    if folders.of_training(path):
        checkpoint_io.load_weights(path, model)
        return
    source = open_source(path, model.arch, predictions=bool(model.config.mtp_num_layers))
    left = load_into(model.models, source, checkpoint_io.sharding_metadata(model.world))
    if unknown := [key for key in left if key != HEAD]:
        raise UserError(f"{path} has no weights for {', '.join(unknown[:6])} of this model")
    if isinstance(model.models[0], RewardModel):
        logger.info("%s holds a language model: the scalar head of the reward model is new", path)
    logger.info("weights read from %s (%s)", path, source.archive.kind)
    model.weights_changed()
