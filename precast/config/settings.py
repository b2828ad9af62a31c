"""Settings of every service: flag over environment over file over default.

* flags: keyword arguments of ``load_settings``; ``None`` means not given
* environment: ``PRECAST_<NAME>``; an empty variable counts as not set
* file: ``precast.toml`` in the working directory, or the one that ``PRECAST_CONFIG`` names. Common
  settings stand at its top, those of one service in its table::

      log_level = "debug"
      [decode-worker]
      model = "smollm2-135m-instruct"
      batch_sizes = [1, 2, 4]

A wrong value, or an unknown key in the file, raises ``ConfigError`` with one line.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from precast.config.secrets import masked
from precast.config.sources import ENV_PREFIX, FileSource, describe_error, read_file, source_of
from precast.config.types import (
    AbsolutePath,
    AddressText,
    BatchSizes,
    Buckets,
    Cores,
    Count,
    Names,
    Origins,
    OtlpUrl,
    PasswordFile,
    Port,
    RedisUrl,
    RenewedPath,
    Seconds,
    StoreUrl,
    absolute,
)
from precast.errors import ConfigError
from precast.models.adapter_limits import MAX_ADAPTED_TOKENS, MAX_ADAPTERS
from precast.models.precision import (
    KvDtype,
    Precision,
    Quantization,
    QuantizationSetting,
    WeightDtype,
    chosen_quantization,
    default_head_quantization,
    default_kv_dtype,
)
from precast.rpc.address import reachable

DEFAULT_MODEL = "smollm2-135m-instruct"


class CommonSettings(BaseSettings):
    """What every service has."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,  # they are the flags' help
    )
    section: ClassVar[str] = ""
    """This service's table in the settings file."""
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    home: AbsolutePath = Path("~/.precast")
    """Folder that holds models, artifacts, keys and logs."""
    redis_password_file: PasswordFile | None = None
    """File with the password of ``redis_url``'s user, where it should stand in no variable."""
    redis_url: RedisUrl = "redis://127.0.0.1:6379/0"
    """Where the services meet."""
    tls_dir: RenewedPath | None = None
    """Folder of certificates that `precast keys tls` makes, a subfolder for each role: gRPC is
    mutual TLS then; none: it is plain."""
    otlp_endpoint: OtlpUrl | None = None
    """Where gateway and decode workers send traces, OTLP over gRPC, such as http://collector:4317;
    none: there are no traces."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below it are not written."""
    log_format: Literal["console", "json"] = "console"
    """For people, or an object a line for machines."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, FileSource(settings_cls, _file_values(cls))


class GatewaySettings(CommonSettings):
    """``precast gateway``: HTTP in front of the decode workers."""

    section: ClassVar[str] = "gateway"

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine."""
    port: Port = 8000
    """HTTP port."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes that share the port, the API keys' limits and `max_in_flight`; one that ends is
    replaced. The others' metrics are at the ports behind `metrics_port`."""
    models_dir: AbsolutePath = Field(default_factory=lambda data: data["home"] / "models")
    """Folder of the models; `models` in `home`."""
    request_timeout_s: Seconds = 600.0
    """Longest that one request may take, queueing included."""
    max_body_bytes: Count = 8 << 20
    """Largest body of a request; larger ones are answered with 413."""
    max_in_flight: Count = 1024
    """Requests in the gateway at once; more are answered with 429."""
    allow_control_tokens: bool = False
    """Take ``<|im_end|>`` and the like in messages as control tokens, not as text."""
    tool_parser: Literal[
        "auto",
        "none",
        "hermes",
        "llama3",
        "mistral",
        "gemma",
        "phi4",
        "qwen3_coder",
        "glm4",
        "generic",
    ] = "auto"
    """How models write calls of tools; auto: as the chat template shows; none: no tools."""
    reasoning_parser: Literal["auto", "none", "think"] = "auto"
    """Show ``<think>`` blocks apart, as reasoning_content; auto: if the template has them."""
    embedding_pooling: Literal["mean", "last"] = "mean"
    """Of /v1/embeddings, where a request doesn't say it: over all tokens of a text, or its last."""
    responses_lifetime_s: int = Field(default=0, ge=0, le=366 * 86_400)
    """How long responses of /v1/responses are kept in Redis, for previous_response_id; 0: none
    are."""
    responses_max_mb: Count = 64
    """Most that the responses of one API key may take in Redis; the oldest make way."""
    strict_fields: bool = False
    """Refuse requests with fields that are not known, which are ignored and named otherwise."""
    max_connections: Count = 4096
    """Open connections; a new one then closes the one that has waited longest for a request."""
    cors_origins: Origins = ()
    """Origins of web pages that may use the API, such as https://app.example.com; *: all; empty:
    none. Unless it is empty, a body needs the content type application/json."""
    api_keys_dir: AbsolutePath = Field(default_factory=lambda data: data["home"] / "keys" / "api")
    """Folder of the API keys that `precast keys api create` makes; while there is none, no key is
    asked for."""
    https_certificate: RenewedPath | None = None
    """PEM file with the server's certificate and those that vouch for it; none: plain HTTP."""
    https_key: RenewedPath | None = None
    """PEM file with the key of ``https_certificate``."""
    metrics_host: str = "127.0.0.1"
    """Interface of ``metrics_port``."""
    metrics_port: Port = 8001
    """Prometheus metrics and the API's reference (/metrics, /docs), apart from the API; 0: none."""
    expected_models: Names = ()
    """Models whose workers may have yet to come up: requests for them are answered with 503 and
    Retry-After meanwhile, those for other unknown models with 404."""
    worker_refresh_s: Seconds = 2.0
    """How often the list of live workers is read; four times as often while there is none, or one
    doesn't answer."""
    model_host: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,80}$")
    """Name of the Unix socket where models are started on demand; `precast serve
    --models-on-demand` gives it. Empty: workers are there by themselves."""
    model_wait_s: Seconds = 120.0
    """Longest that a request waits for its model to be started on demand."""
    access_log: bool = False
    """A line in the log for each HTTP request; nothing of what is asked or answered is in it."""
    drain_timeout_s: Seconds = 30.0
    """How long running requests may go on after a stop was asked for."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.https_certificate is None) != (self.https_key is None):
            raise ValueError("https_certificate and https_key need each other")
        if self.port in self.metrics_ports:
            raise ValueError(f"port = {self.port}: metrics are to be at {self.metrics_ports[0]}")
        if self.metrics_ports and self.metrics_ports[-1] > 65535:
            raise ValueError(f"metrics_port = {self.metrics_port}: {self.workers} ports are needed")
        return self

    @property
    def metrics_ports(self) -> range:
        """A port for each process, or none."""
        return range(self.metrics_port, self.metrics_port + self.workers * bool(self.metrics_port))


class CompileWorkerSettings(CommonSettings):
    """``precast compile-worker``: captures graphs and hands them out."""

    section: ClassVar[str] = "compile-worker"

    listen: AddressText = "127.0.0.1:7100"
    """Address of its gRPC server."""
    advertise: AddressText = Field(default_factory=lambda data: reachable(data["listen"]))
    """Address under which other services reach it: ``listen``, this host's name for a wildcard."""
    metrics_host: str = "127.0.0.1"
    """Interface of ``metrics_port``."""
    metrics_port: Port = 0
    """Prometheus metrics over HTTP; 0: none."""
    store_dir: AbsolutePath = Field(default_factory=lambda data: data["home"] / "store")
    """Folder of the artifacts, or of copies where ``store_url`` says that they are elsewhere."""
    store_url: StoreUrl | None = None
    """s3://bucket/prefix to keep artifacts there; none: in ``store_dir``."""
    store_max_mb: Count = 8192
    """Most that artifacts may take; what nobody runs goes first."""
    scrub_interval_s: Seconds = 21_600.0
    """How often every artifact is read back and compared with its signature."""
    signing_key: AbsolutePath = Field(
        default_factory=lambda data: data["home"] / "keys" / "signing.key"
    )
    """Ed25519 private key; made on the first start."""
    trusted_keys_dir: AbsolutePath = Field(
        default_factory=lambda data: data["home"] / "keys" / "trusted"
    )
    """Folder where the public half of ``signing_key`` is put for decode workers."""
    build_dir: AbsolutePath = Field(default_factory=lambda data: data["home"] / "cache" / "build")
    """What captures share: headers and compiled parts. To be trusted like the signing key."""
    capture_timeout_s: Seconds = 300.0
    """Longest that one capture may take before it is killed, without its waits for a free CPU."""
    capture_memory_mb: Count = 4096
    """Resident memory of one capture, its compilers included."""
    capture_idle: bool = True
    """Give captures only what others leave of the CPUs, so that decode workers don't feel them."""
    capture_cpus: Cores = ()
    """CPU ids that captures may use; empty: all that the process may."""
    parallel_captures: Count = 1
    """Captures at once."""
    max_queued: Count = 1024
    """Captures in the queue; more are refused as overloaded."""
    canary_steps: int = Field(default=32, ge=0, le=10_000)
    """Steps in which one worker compares a new version with the serving one before all take it
    up; 0: none."""
    canary_live_s: float = Field(default=20.0, ge=0.0, le=3600.0)
    """Seconds in which these are steps of requests; what is missing then is made up."""
    canary_max_slowdown: float = Field(default=0.25, ge=0.0)
    """Most that a new version's step may take longer: 0.25 is a quarter."""
    isa_targets: Names = ()
    """Instruction sets to build for; empty: whichever a decode worker asks for."""


def adapter_of(text: str) -> tuple[str, Path | None]:
    """Name and folder out of ``name=folder``, or the name alone of one that was imported. Raises
    ValueError."""
    name, given, folder = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) or bool(given) != bool(folder):
        raise ValueError(f"{text!r} must be name=folder, or the name of one that was imported")
    return name, absolute(Path(folder)) if folder else None


class DecodeWorkerSettings(CommonSettings):
    """``precast decode-worker``: a model replica, or several, with a process for each
    tensor-parallel rank."""

    section: ClassVar[str] = "decode-worker"

    listen: AddressText = "127.0.0.1:7200"
    """Address of its gRPC server."""
    advertise: AddressText = Field(default_factory=lambda data: reachable(data["listen"]))
    """Address under which other services reach it: ``listen``, this host's name for a wildcard."""
    models_dir: AbsolutePath = Field(default_factory=lambda data: data["home"] / "models")
    """Folder of the models; `models` in `home`."""
    model: str = Field(default=DEFAULT_MODEL, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of a folder in ``models_dir``."""
    adapter: Names = ()
    """LoRA adapters of the model, separated by commas, which requests choose by their names:
    name=folder for a folder as PEFT writes it, the name alone of one in ``models_dir``."""
    weight_dtype: WeightDtype = "fp32"
    """Of the embedding table, and of linears that are not quantised."""
    quantization: QuantizationSetting = "none"
    """Of the layers' linears: int8 (a scale for each channel), or GGUF's q8_0, q4_0 and q4_1; file:
    what a GGUF file has, as it has it; auto: the format that a quantised checkpoint comes in, file
    for a GGUF file's, and q4_1 for others."""
    head_quantization: QuantizationSetting = Field(
        default_factory=lambda data: default_head_quantization(data["quantization"])
    )
    """Of the output projection; as the layers', but q8_0 where they have 4 bits."""
    kv_dtype: KvDtype = Field(
        default_factory=lambda data: default_kv_dtype(data["weight_dtype"], data["quantization"])
    )
    """Of the KV cache; bf16, but fp32 where the weights are."""
    tp: int = Field(default=1, ge=1, le=64)
    """Tensor-parallel ranks."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Workers to run in one start, on ports that follow each other; the cores are dealt out."""
    cores: Cores = ()
    """CPU ids, dealt out to replicas and ranks in order, a thread for each; empty: as `precast
    doctor` plans it from cores, nodes, affinity and CPU quota."""
    batch_sizes: BatchSizes = (1, 2, 4, 8, 12, 16, 24, 32)
    """Sequences in a decode step to have graphs for."""
    prefill_buckets: Buckets = (16, 64, 256)
    """Tokens in a step with prompts in it to have graphs for; empty: such steps run eagerly where
    no batch size fits them."""
    adapt_graphs: bool = True
    """Have graphs for further sizes of decode steps where traffic shows that they pay, and drop
    those that it never uses."""
    max_graphs: Count = 16
    """Most sizes to have graphs for after adaptation."""
    adapt_interval_s: Seconds = 60.0
    """How often traffic is looked at; what has fewer than 500 steps is added to the next look."""
    max_batch_size: Count = Field(default_factory=lambda data: max(data["batch_sizes"]))
    """Most sequences of a step; the largest of `batch_sizes`."""
    max_context_length: Count | None = None
    """Tokens of a sequence; none: the model's own."""
    kv_blocks: Count | None = None
    """Blocks of the KV cache; none: as many as a full batch of full contexts may need, but no more
    than 30 % of the memory that host and control groups leave. What can't fit is refused."""
    block_size: int = Field(default=32, ge=16, le=256, multiple_of=16)
    """Tokens of a KV block."""
    max_waiting: Count = 256
    """Requests in the queue; more are refused as overloaded."""
    prefill_chunk: Count = 256
    """Most tokens of a step with prompts in it."""
    max_decode_gap_ms: Count = 80
    """Longest time between two tokens of running requests for the sake of prompts, milliseconds: as
    many tokens of prompts are computed beside them as fit, at least 16. It is 2.5 times what
    decoding alone takes where that is less, but not below 45."""
    speculate: bool = True
    """Compute several tokens of a sequence in one step where its text is likely to go on as it did
    before: when it quotes or edits what was given. The tokens are the same."""
    trusted_keys_dir: AbsolutePath = Field(
        default_factory=lambda data: data["home"] / "keys" / "trusted"
    )
    """Public keys whose artifacts may be loaded."""
    allow_unsigned_graphs: bool = False
    """For development: load graphs that no trusted key has signed. Whoever can reach this worker's
    compile worker or cache can then have any code run."""
    cache_dir: AbsolutePath = Field(default_factory=lambda data: data["home"] / "cache" / "graphs")
    """Where verified graphs are kept."""
    packed_dir: AbsolutePath = Field(
        default_factory=lambda data: data["home"] / "cache" / "weights"
    )
    """Where weights are kept as they were quantised and packed."""
    wait_for_graphs: bool = False
    """Become ready only once every batch size has its graph."""
    compile_address: AddressText | None = None
    """The compile worker; none: whichever has a lease."""
    kernel_provider: Literal["native", "reference", "sgl_kernel"] = "native"
    """Who implements the operators; what it can't serve falls to native. reference: plain torch."""
    metrics_host: str = "127.0.0.1"
    """Interface of ``metrics_port``."""
    metrics_port: Port = 0
    """Prometheus metrics over HTTP; 0: none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.adapter and self.prefill_chunk + self.max_batch_size > MAX_ADAPTED_TOKENS:
            raise ValueError(
                f"prefill_chunk = {self.prefill_chunk}: a step with adapters has at most "
                f"{MAX_ADAPTED_TOKENS} tokens"
            )
        if self.max_batch_size < max(self.batch_sizes):
            raise ValueError(
                f"max_batch_size = {self.max_batch_size} is less than the largest of "
                f"batch_sizes = {','.join(map(str, self.batch_sizes))}"
            )
        ranks = self.tp * self.replicas
        if self.cores and len(self.cores) < ranks:
            what = f"tp = {self.tp}" if self.replicas == 1 else f"{ranks} ranks"
            raise ValueError(f"cores names {len(self.cores)} CPUs, too few for {what}")
        return self

    @field_validator("adapter")
    @classmethod
    def _named(cls, adapters: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        names = [adapter_of(text)[0] for text in adapters]
        if len(names) > MAX_ADAPTERS:
            raise ValueError(f"more than {MAX_ADAPTERS} adapters")
        for name in names:
            if names.count(name) > 1 or name == info.data.get("model"):
                raise ValueError(f"two models are called {name}")
        return adapters

    @property
    def adapter_folders(self) -> tuple[tuple[str, Path], ...]:
        """Names and folders."""
        found = map(adapter_of, self.adapter)
        return tuple((name, folder or self.models_dir / name) for name, folder in found)

    @property
    def served_names(self) -> tuple[str, ...]:
        """The model's, then its adapters'."""
        return (self.model, *(name for name, _ in self.adapter_folders))

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Tokens of a step to have graphs for."""
        return tuple(sorted({*self.batch_sizes, *self.prefill_buckets}))

    def precision(self, own: Quantization | None) -> Precision:
        """``own``: the format that the checkpoint comes in, if it is quantised."""
        layers = chosen_quantization(self.quantization, own)
        if self.head_quantization == "auto":
            head = default_head_quantization(layers)
        else:
            head = self.head_quantization
        return Precision(
            weight_dtype=self.weight_dtype,
            quantization=layers,
            head_quantization=head,
            kv_dtype=self.kv_dtype,
        )

    @property
    def model_dir(self) -> Path:
        return self.models_dir / self.model


class ServeSettings(CommonSettings):
    """``precast serve``: every service on this machine."""

    section: ClassVar[str] = "serve"

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine."""
    port: Port = 8000
    """HTTP port."""
    metrics_port: Port = 8001
    """The gateway's metrics and reference of the API, on the loopback interface; 0: none."""
    gateway_workers: int = Field(default=1, ge=1, le=64)
    """`workers` of the gateway."""
    cors_origins: Origins = ()
    """Origins of web pages that may use the API; *: all; empty: none."""
    model: str = Field(
        default=DEFAULT_MODEL,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,2}$|\.gguf$",
    )
    """As of the decode worker; or org/name on a Hugging Face hub, which is pulled unless it is
    there, or a .gguf file, which is imported unless it is there."""
    more_models: Names = ()
    """Further models, likewise, each with a worker of its own that starts when the one before has
    its memory."""
    models_on_demand: bool = False
    """Serve every model in the home folder, each from its first request on. `model` and
    `more_models` are only seen to be there; the default model only where there is no other."""
    models_memory_mb: Count | None = None
    """Memory that models on demand may take together: the one that was used longest ago makes room
    for another. None: 70 % of what host and control groups leave at the start."""
    idle_timeout: Seconds = 600.0
    """Seconds without a request after which a model on demand is stopped."""
    weight_dtype: WeightDtype = "fp32"
    """As of the decode worker."""
    quantization: QuantizationSetting = "auto"
    """As of the decode worker."""
    head_quantization: QuantizationSetting = Field(
        default_factory=lambda data: default_head_quantization(data["quantization"])
    )
    """As of the decode worker."""
    kv_dtype: KvDtype = Field(
        default_factory=lambda data: default_kv_dtype(data["weight_dtype"], data["quantization"])
    )
    """As of the decode worker."""
    tp: int = Field(default=1, ge=1, le=64)
    """As of the decode worker."""
    cores: Cores = ()
    """As of the decode worker."""
    batch_sizes: BatchSizes = (1, 2, 4, 8, 12, 16, 24, 32)
    """As of the decode worker."""
    prefill_buckets: Buckets = (16, 64, 256)
    """As of the decode worker."""
    max_context_length: Count | None = None
    """As of the decode worker."""
    adapter: Names = ()
    """As of the decode worker, of `model`; models on demand have those that were imported for them,
    too."""
    compile_port: Port = 7100
    """Of the compile worker, on loopback."""
    decode_port: Port = 7200
    """Of the decode worker, on loopback."""

    @model_validator(mode="after")
    def _adapters_run(self) -> Self:
        names = [*self.more_models, *(adapter_of(text)[0] for text in self.adapter)]
        for name in names:
            if self.adapter and names.count(name) > 1:
                raise ValueError(f"adapter: two models are called {name}")
        return self


SETTINGS: tuple[type[CommonSettings], ...] = (
    GatewaySettings,
    CompileWorkerSettings,
    DecodeWorkerSettings,
    ServeSettings,
)
"""Every class that has a table in the settings file."""

_S = TypeVar("_S", bound=CommonSettings)


class SettingRow(NamedTuple):
    """One setting as printed at a start."""

    name: str
    value: str
    source: str


def load_settings(cls: type[_S], **flags: Any) -> _S:
    """Settings of one service out of flags, environment, file and defaults.

    Flags that are ``None`` count as not given. Raises ``ConfigError`` with one line that names each
    wrong setting, its value and where the value came from.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    unknown = sorted(set(given) - set(cls.model_fields))
    if unknown:
        raise ConfigError(f"{unknown[0]} = {given[unknown[0]]!r} (flag): unknown setting")
    file_values = _file_values(cls)
    try:
        settings = cls(**given)
    except ValidationError as error:
        raise ConfigError(describe_error(error, given, file_values)) from None
    for name in cls.model_fields:
        settings._sources[name] = source_of(name, given, file_values)
    return settings


def describe(settings: CommonSettings) -> list[SettingRow]:
    """Every setting with its value and source, to print at a start."""
    return [
        SettingRow(name, _shown(getattr(settings, name)), settings._sources.get(name, "flag"))
        for name in type(settings).model_fields
    ]


def _file_values(cls: type[CommonSettings]) -> dict[str, Any]:
    sections = {kind.section: set(kind.model_fields) for kind in SETTINGS}
    return read_file(cls.section, sections, set(CommonSettings.model_fields))


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else masked(str(value))
