"""What each replica of a start gets of the machine: cores, and KV blocks."""

from dataclasses import dataclass, field

from precast.config.settings import DecodeWorkerSettings
from precast.log import get_logger
from precast.models.config import load_config
from precast.models.windows import model_window
from precast.sizing import Sizing, size
from precast.system.free_memory import free_memory, gib
from precast.system.placement import Placement, RankPlacement, described, plan, this_machine
from precast.system.shared_memory import new_segment_name
from services.decode_worker.engine.agreed_content import AgreedContent
from services.decode_worker.engine.windows import WindowBlocks
from services.decode_worker.model_files import adapter_files, model_folder
from services.decode_worker.ranks.protocol import Init

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Share:
    """One replica's."""

    ranks: tuple[RankPlacement, ...]
    context: int
    """Tokens of a sequence, at the most."""
    kv_blocks: int
    window_blocks: int = 0
    """Of layers that attend to a window; 0: there are none."""
    content: AgreedContent = field(default_factory=AgreedContent)
    """Of the model's files; the same object for all replicas."""


def shares(settings: DecodeWorkerSettings) -> list[Share]:
    """One for each replica, decided once: what is free changes as the first of them loads. Logs
    them. Raises ConfigError if the machine can't serve them, and what ``load_config`` raises."""
    placement = plan(
        this_machine(), tp=settings.tp, replicas=settings.replicas, cores=settings.cores
    )
    sizing = size(settings, model_folder(settings), free_memory())
    _log(placement, sizing)
    content = AgreedContent()
    return [
        Share(
            ranks=ranks,
            context=sizing.context,
            kv_blocks=sizing.blocks,
            window_blocks=sizing.window_blocks,
            content=content,
        )
        for ranks in placement.replicas
    ]


def rank_inits(settings: DecodeWorkerSettings, share: Share) -> list[Init]:
    """The first command of each rank of a new group."""
    group_id, folder = new_segment_name(), model_folder(settings)
    precision = settings.precision(load_config(folder).own_quantization)
    adapters = tuple(
        (one.name, str(one.config), str(one.weights)) for one in adapter_files(settings)
    )
    return [
        Init(
            model_dir=str(folder),
            packed_dir=str(settings.packed_dir),
            precision=precision,
            tp_rank=number,
            tp_size=settings.tp,
            cores=rank.threads,
            cpus=rank.cpus,
            kv_blocks=share.kv_blocks,
            window_blocks=share.window_blocks,
            block_size=settings.block_size,
            max_batch_size=settings.max_batch_size,
            max_context_length=share.context,
            group_id=group_id,
            kernel_provider=settings.kernel_provider,
            adapters=adapters,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
        for number, rank in enumerate(share.ranks)
    ]


def window_blocks(settings: DecodeWorkerSettings, share: Share) -> WindowBlocks | None:
    """The pool of blocks of layers that attend to a window, if there are such."""
    if not share.window_blocks:
        return None
    window = model_window(load_config(model_folder(settings)))
    return WindowBlocks(share.window_blocks, settings.block_size, window)


def _log(placement: Placement, sizing: Sizing) -> None:
    log.info(
        "placement",
        ranks=[described(rank) for ranks in placement.replicas for rank in ranks],
        kv=f"{gib(sizing.kv_bytes)} in {sizing.blocks} blocks{_windows(sizing)}",
        why=[*placement.reasons, sizing.why],
    )
    for warning in placement.warnings:
        log.warning("placement", reason=warning)


def _windows(sizing: Sizing) -> str:
    return f", {sizing.window_blocks} of windows" if sizing.window_blocks else ""
