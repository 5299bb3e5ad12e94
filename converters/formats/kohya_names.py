"""From sd-scripts' names to the modules of a base, where the base leaves no doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.formats.base_facts import layers_per_block, module_rows
from converters.formats.format import FormatContext
from loraport.errors import LoraportError
from loraport.naming.kohya import component_of, flattened, in_pipeline, without_prefix
from loraport.naming.original_diffusion import flux_modules, unet_name
from loraport.naming.original_wan import wan_name

_TRANSFORMER = "transformer"  # sd-scripts calls it the UNet too


@dataclass(frozen=True)
class Target:
    """A module that (some rows of) a file's module is for.

    Attributes:
        path: The module's path, with the component's name where the file has several.
        first_row: Where its rows begin in the file's B.
        rows: How many there are; ``None`` for all.
        total: How many rows the file's B must have, where the base tells.
        halves_swapped: The two halves of the rows are exchanged.
    """

    path: str
    first_row: int = 0
    rows: int | None = None
    total: int = 0
    halves_swapped: bool = False


@dataclass(frozen=True)
class KnownModules:
    """The modules of one component of the base.

    Attributes:
        flat: Path with underscores for dots → the paths that look so.
        rows: Path → rows of its weight; empty where the base is not at hand.
        blocks: Layers of each block of a UNet.
        prefix: What stands before the paths where the file has several components.
    """

    flat: Mapping[str, Sequence[str]]
    rows: Mapping[str, int]
    blocks: int | None = None
    prefix: str = ""

    def targets(self, name: str) -> list[Target]:
        """Return what a name without its component's prefix stands for.

        Raises:
            LoraportError: If it is no module of the base, or not a certain one.
        """
        original = unet_name(name, self.blocks) if self.blocks else None
        for each in (name, original, wan_name(name)):
            paths = self.flat.get(each, []) if each else []
            if len(paths) == 1:
                return [Target(self.prefix + paths[0])]
            if paths:
                raise LoraportError(f"several: {', '.join(paths)}")
        flux = flux_modules(name)
        if flux is None:
            raise LoraportError("none")
        paths = []
        for each in flux.names:
            found = self.flat.get(each, [])
            if len(found) != 1 or found[0] not in self.rows:
                raise LoraportError(f"several: {', '.join(found)}" if found else "none")
            paths.append(found[0])
        rows = [self.rows[path] for path in paths]
        return [
            Target(
                self.prefix + path, sum(rows[:number]), rows[number], sum(rows), flux.halves_swapped
            )
            for number, path in enumerate(paths)
        ]


def known_modules(
    names: Sequence[str], carried_paths: Sequence[str], context: FormatContext
) -> dict[str, KnownModules]:
    """Return the modules of each component that a file has names of.

    Args:
        names: The file's module names.
        carried_paths: Module paths that the file itself tells of.
        context: Names the base, if anything does.

    Raises:
        LoraportError: If the base cannot be read.
    """
    components = sorted({str(component_of(name)) for name in names})
    several = len(components) > 1
    if context.base is None:
        if not carried_paths:
            return {}
        if not several or not in_pipeline(carried_paths):
            flat = flattened(carried_paths)
            return {component: KnownModules(flat, {}) for component in components}
        return {
            component: KnownModules(
                flattened(
                    path.removeprefix(f"{component}.")
                    for path in carried_paths
                    if path.startswith(f"{component}.")
                ),
                {},
                prefix=f"{component}.",
            )
            for component in components
        }
    return {
        component: modules_of_base(component, context, several=several) for component in components
    }


def modules_of_base(
    component: str, context: FormatContext, *, several: bool = False
) -> KnownModules:
    """Return the modules that one component has in the base.

    Args:
        component: Its name; that of the UNet is a transformer's, too.
        context: Names the base.
        several: Paths begin with the component's name.

    Raises:
        LoraportError: If the base cannot be read.
    """
    name, directory = _directory(component, context)
    rows = module_rows(directory)
    return KnownModules(
        flattened(rows),
        rows,
        layers_per_block(directory) if component == "unet" else None,
        f"{name}." if several else "",
    )


def find_targets(name: str, known: Mapping[str, KnownModules]) -> list[Target]:
    """Return the modules that one of sd-scripts' names stands for.

    Raises:
        LoraportError: If there are none, or the name leaves it open which.
    """
    modules = known.get(str(component_of(name)))
    if modules is None:
        raise LoraportError("none")
    return modules.targets(without_prefix(name))


def _directory(component: str, context: FormatContext) -> tuple[str, Path]:
    """Return the name a component has in the base, and its directory."""
    root = Path(str(context.base)).expanduser()
    if (root / "model_index.json").is_file():
        names = (component, _TRANSFORMER) if component == "unet" else (component,)
        for name in names:
            if (root / name / "config.json").is_file():
                return name, root / name
        raise LoraportError(
            f"base {root}: expected {' or '.join(names)} in the pipeline, got neither; give "
            "--base with the pipeline the adapter was trained on"
        )
    directory = context.base_directory()
    assert directory is not None
    return component, directory
