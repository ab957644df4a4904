"""Weights that transformers renames or merges while loading: mixtures of experts.

Files have a tensor per expert, the model one tensor for all experts of a layer. The names are
translated by transformers' own rules, and its own operations merge the tensors: of one layer at a
time, and of this rank's experts alone where experts are simply stacked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Merged:
    """Weights of the model that are made of several tensors of the files."""

    first: str
    """Name of the first of them."""
    converter: WeightConverter
    sources: dict[str, list[str]]
    """Pattern of the converter -> names in the files, in the order of the experts."""

    @property
    def targets(self) -> list[str]:
        """Names of the weights that are made."""
        pattern, *others = self.converter.target_patterns
        return [self.first, *(self.first.replace(pattern, other) for other in others)]

    def stacks(self, experts: int) -> bool:
        """Whether entry e of the weight's first dimension is made of the e-th sources alone."""
        stack, *others = self.converter.operations
        return (
            isinstance(stack, MergeModulelist)
            and stack.dim == 0
            and all(isinstance(op, Concatenate) and op.dim > 0 for op in others)
            and all(len(names) == experts for names in self.sources.values())
        )

    def make(
        self, model: PreTrainedModel, tensors: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """Merge tensors, by pattern as in `sources`. Returns the weights by name."""
        converter = deepcopy(self.converter)
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(self.first, self.first, pattern, tensor)
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def translate(
    model: PreTrainedModel, wanted: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, str], list[Merged], set[str]]:
    """How transformers loads the tensors of a model's files.

    Args:
        model: sharded or not.
        wanted: its tensors, by the names that they have without an adapter.
        names: of the tensors in the files.

    Returns:
        Name in the files -> name in the model, of those that are only renamed; those that are
        merged; names that the model does not have.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    sources: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unknown = set()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None  # the rules are for files of an older release
        if target not in wanted:
            unknown.add(name)
        elif pattern is None:
            renamed[name] = target
        else:
            rule = converters.index(of_pattern[pattern])
            sources[target, rule][pattern].append(name)
    merged = [Merged(first, converters[rule], dict(by)) for (first, rule), by in sources.items()]
    return renamed, merged, unknown
