"""A little text about nothing in particular: an adapter should not unlearn it."""

from __future__ import annotations

PARAGRAPHS = (
    "Rain falls when the drops in a cloud grow too heavy for the air to carry them. Some of it "
    "runs off into rivers, some sinks into the ground, and some rises again as vapour.",
    "To bake a plain loaf, mix flour, water, salt and yeast, knead the dough until it is smooth, "
    "let it rise until it has doubled, and bake it in a hot oven until the crust is brown.",
    "The library opens at nine in the morning. Books may be kept for three weeks, and anyone who "
    "needs one for longer can ask at the desk, unless another reader is waiting for it.",
    "A triangle has three sides, and its angles add up to one hundred and eighty degrees. If two "
    "of its sides are equal, then so are the two angles opposite to them.",
    "The train left the city, crossed the bridge over the river and went slowly up into the "
    "hills. By the time it reached the last station, most of the passengers had fallen asleep.",
    "Plants take in light, water and carbon dioxide and make sugar of them. The oxygen that is "
    "left over goes into the air, where animals and people breathe it.",
)
