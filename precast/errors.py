"""Every error that Precast raises on purpose.

::

    PrecastError                  base; INTERNAL at a gRPC edge
    ├── ConfigError               a setting, flag or file has a wrong value; stops a start
    ├── InvalidRequest            the caller's mistake; the same request always fails
    │   ├── ContextLengthExceeded prompt and max_tokens don't fit the context window
    │   └── UnsupportedSpec       a graph spec that this compile worker can't build
    ├── NotFound
    │   ├── ModelNotFound
    │   ├── GraphNotFound
    │   └── JobNotFound
    ├── ModelCorrupt              a model folder that can't be read
    ├── UnsupportedArchitecture   a model folder of an architecture that Precast doesn't have
    ├── ArtifactRejected          digest, signature or format of a graph artifact is wrong
    ├── CaptureFailed             a graph could not be captured, or differs from eager
    ├── WrongState                what was asked for doesn't fit how things stand now
    ├── Overloaded                a queue is full; another worker may take the request
    ├── Unavailable               a part that is needed can't be reached now; retrying may help
    │   ├── RegistryUnavailable   Redis
    │   ├── StoreUnavailable      the store of artifacts
    │   ├── WorkerUnavailable     no live worker, or the worker went away
    │   │   └── WorkerUnreachable the request has not been sent
    │   └── CompilerUnavailable   no live compile worker, or none in reach
    └── DeadlineExceeded          something took longer than it may

An error's text is one line that a user can act on: it names the thing and its value. Edges turn
these into their protocol: ``precast.rpc`` into gRPC statuses, the gateway into OpenAI's error
object, the command line into one line on stderr.
"""


class PrecastError(Exception):
    """Base of all errors that are raised on purpose."""


class ConfigError(PrecastError):
    """A setting, flag or file has a wrong value. Stops a start with its one line."""


class InvalidRequest(PrecastError):
    """The caller's mistake: the same request will always fail."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for don't fit the model's context window."""


class UnsupportedSpec(InvalidRequest):
    """A graph spec that can't be built: a factor is missing, unknown or out of range."""


class NotFound(PrecastError):
    """Something was asked for by a name that nothing has."""


class ModelNotFound(NotFound):
    """No model of this name."""


class GraphNotFound(NotFound):
    """No graph of this key or version."""


class JobNotFound(NotFound):
    """No capture job of this id."""


class ModelCorrupt(PrecastError):
    """A model folder lacks a file or holds one that can't be read."""


class UnsupportedArchitecture(PrecastError):
    """A model's config names an architecture or a feature that Precast doesn't have."""


class ArtifactRejected(PrecastError):
    """A graph artifact whose format, digest, signature or target is wrong. It was not loaded."""


class CaptureFailed(PrecastError):
    """A graph could not be captured in its limits, or its output differs from eager's."""


class WrongState(PrecastError):
    """What was asked for doesn't fit how things stand. It may be right once that has changed."""


class Overloaded(PrecastError):
    """A bounded queue is full or a worker is draining. Another worker may take the request."""


class Unavailable(PrecastError):
    """A part that is needed can't be reached now. Retrying later may help."""


class RegistryUnavailable(Unavailable):
    """Redis doesn't answer."""


class StoreUnavailable(Unavailable):
    """The store of graph artifacts doesn't answer, or refuses."""


class WorkerUnavailable(Unavailable):
    """No live decode worker for the model, or the worker went away."""


class WorkerUnreachable(WorkerUnavailable):
    """No connection to the worker: it has not got the request."""


class CompilerUnavailable(Unavailable):
    """No live compile worker, or it can't be reached."""


class DeadlineExceeded(PrecastError):
    """Something took longer than it may."""
