"""The colours of the shapes world: GenEval's ten for objects, and plain backgrounds that are none of the ten."""

from types import MappingProxyType

# In GenEval's order. Apart from each other and from every background by at least 24 in CIE Lab (1976) units.
COLOURS = MappingProxyType(
    {
        "red": (214, 26, 32),
        "orange": (248, 134, 10),
        "yellow": (252, 228, 28),
        "green": (24, 142, 48),
        "blue": (28, 64, 214),
        "purple": (124, 34, 156),
        "pink": (252, 122, 190),
        "brown": (112, 62, 24),
        "black": (12, 12, 12),
        "white": (255, 255, 255),
    }
)

BACKGROUNDS = MappingProxyType(
    {
        "gray": (144, 144, 144),
        "beige": (214, 192, 148),
        "mint": (150, 218, 172),
        "lavender": (186, 172, 226),
        "teal": (24, 120, 128),
        "aqua": (110, 206, 222),
    }
)
