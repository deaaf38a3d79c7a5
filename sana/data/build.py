"""From a config to the data set it names."""

from pathlib import Path

from sana.config import ConfigError, SanaConfig
from sana.data.buckets import Frame
from sana.data.captions import CaptionChoice
from sana.data.hf_dataset import HFDataset, is_dataset
from sana.data.image_folder import ImageFolder
from sana.data.pictures import Encodable, Reading
from sana.data.shapes import ShapesDataset
from sana.data.tar_shards import META, TarShards
from sana.resolution import TABLES
from sana.utils.logging import get_logger

log = get_logger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"


def build_dataset(config: SanaConfig) -> Encodable:
    """The data set that a config names; its bad samples go to `work_dir/bad_samples.jsonl`.

    Raises:
        ConfigError: it cannot be trained on.
        ValueError: its folders do not hold what they should.
    """
    return open_dataset(config, reading_of(config))


def open_dataset(config: SanaConfig, reading: Reading) -> Encodable:
    """The data set that a config names, read in a given way. Raises as `build_dataset`."""
    data = config.data
    if data.type == "SanaShapes":
        if config.model.multi_scale:
            raise ConfigError("model.multi_scale: SanaShapes draws squares; set --model.multi_scale=false")
        return ShapesDataset(config.model.image_size, data.num_scenes)
    if not data.data_dir:
        raise ConfigError(f'data.data_dir: {data.type} needs a folder: --data.data_dir="[DIR]"')
    for key in ("load_vae_feat", "load_text_feat"):
        if getattr(data, key):
            log.warning(
                "data.%s: features stored in a data set are not read; train.feature_cache_dir keeps those that are "
                "computed here",
                key,
            )
    if data.type in ("SanaWebDatasetMS", "SanaWebDataset"):
        return TarShards(data.data_dir, reading, sort_shards=data.sort_dataset)
    if data.hq_only:
        raise ConfigError(
            f"data.hq_only: only tar shards say which samples are of high quality, not {data.type}"
        )
    if data.type == "SanaImgDataset":
        return ImageFolder(data.data_dir, reading)
    if data.type == "SanaHFDataset":
        columns = {"image_column": data.image_column, "caption_column": data.caption_column}
        return HFDataset(data.data_dir, reading, **columns)
    raise ConfigError(
        f"data.type: {data.type} cannot be trained on; use SanaWebDatasetMS (tar shards), SanaImgDataset (a folder of "
        "pictures), SanaHFDataset (a Hugging Face data set) or SanaShapes"
    )


def reading_of(config: SanaConfig) -> Reading:
    """How a config's files become samples."""
    data, model = config.data, config.model
    name = model.aspect_ratio_type if model.multi_scale else None
    frame = Frame(
        size=model.image_size,
        table=TABLES[name] if name else None,
        table_name=name or "",
        multiple=config.vae.vae_downsample_rate,
    )
    return Reading(
        frame=frame,
        choice=CaptionChoice(
            selection=data.caption_selection_type,
            threshold=data.clip_thr,
            temperature=data.clip_thr_temperature,
            proportion=data.caption_proportion,
        ),
        seed=config.train.seed,
        caption_suffixes=data.external_caption_suffixes,
        score_suffixes=data.external_clipscore_suffixes,
        minimal_score=data.del_img_clip_thr,
        hq_only=data.hq_only,
        index_dir=Path(config.work_dir) / "data_index",
        bad_limit=data.bad_sample_limit,
        bad_file=Path(config.work_dir) / BAD_SAMPLES,
    )


def detected_type(folder: str | Path) -> str:
    """The `data.type` that a folder looks like."""
    folder = Path(folder)
    if (folder / META).is_file() or any(folder.glob("*.tar")):
        return "SanaWebDatasetMS"
    return "SanaHFDataset" if is_dataset(folder) else "SanaImgDataset"
