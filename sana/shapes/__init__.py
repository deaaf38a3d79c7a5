"""The procedural world of Sana-tiny: captioned scenes of plain shapes whose ground truth is exact.

`scene` says what can stand in a picture, `splits` which combinations training never sees, `render` draws, `captions`
speaks, `detector` looks. Everything is a pure function of a seed.
"""
