"""The run-time type checker of the suite: shapes and types of all annotated functions."""

import contextlib
import functools
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for
# For functions without shapes; with the error that those with shapes raise.
types_alone = beartype(
    conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)


def jaxtyped(*, typechecker, with_shapes=jaxtyping.jaxtyped):
    """What the import hook decorates with: `jaxtyping.jaxtyped` where annotations have shapes.

    Other functions are most of a run's calls and need no names of axes, which take three times as
    long as the check of their types.
    """

    def decorate(definition):
        annotations = getattr(definition, '__annotations__', None)
        if isinstance(definition, type) or any(map(_has_shape, (annotations or {}).values())):
            return with_shapes(definition, typechecker=typechecker)
        if not annotations:
            return definition
        checked = types_alone(definition)

        @functools.wraps(definition)
        def call(*args, **kwargs):
            function = definition if jaxtyping.config.jaxtyping_disable else checked
            return function(*args, **kwargs)

        # As beartype names its functions: no file, which messages and tests would show.
        call.__code__ = call.__code__.replace(co_filename='<@beartype>')
        return call

    return decorate


def _has_shape(annotation):
    """Whether arrays with shapes are a part of it; a text may be any annotation."""
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    if isinstance(annotation, list):  # arguments of a Callable
        return any(map(_has_shape, annotation))
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    if annotation is jaxtyping.PyTree:
        return True
    return any(map(_has_shape, typing.get_args(annotation)))


@contextlib.contextmanager
def off():
    """No checks, as users run it: for errors that the package itself raises for wrong shapes."""
    jaxtyping.config.update('jaxtyping_disable', True)
    try:
        yield
    finally:
        jaxtyping.config.update('jaxtyping_disable', False)
