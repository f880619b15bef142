"""Colormaps of RGB images: recognize them, convert colors to scalars in [0, 1] and back.

A colormap has several tables: jet of Matplotlib is not jet of MATLAB, and programs write 64 or 256 colors, rounded or
truncated to 8 bits. "jet/matlab64" names a table, "jet" the one of them that fits the images best.
"""

import base64
import functools
import zlib
from dataclasses import dataclass

import numpy as np

from ..config import require

COLORMAPS = "jet", "parula", "viridis", "turbo", "hot", "plasma", "inferno", "magma", "cividis", "gray_r"
# Enough colors to identify a colormap, and more than the images of one have.
MIN_COLORS, MAX_COLORS = 16, 1024
MAX_FITTED = 4096       # most frequent colors to which a table is fitted
EXACT_DISTANCE = 2.0    # of 8-bit colors: one rounding error in each channel
# MATLAB's parula until and from R2017b, in units of 1e-4: differences of entries, higher and lower bytes, compressed.
_PARULA = {
    "r2014b": (
        "c-rG&VEF(4|G&Tg{xd+pe<%R48F2uZDxeZJm@)?Z;6DN&1cBN_Kzf-FMiK@7A()EF?AO{@tg_UOXD(UU9B09IWlDPfre{C?s+XSo"
        "tK<+<Ib+M2>z5C&o!M5F85ip7?qq9iu6W$!?$)JCcHZW+Ppg0Z;RmyjbBgHYElcK1pEh&B`opIVt)A9gnw=US6&~#G>1=JFEXKv~"
        ">&yGsFP=Vm{N(uuX4Bqd7tWr&^xzAxhV7cCZ@>Ow{9n__ac$qml`GfoIREm?;{)@X^W#Ik989&9Bn9~drFHFnBa^cWO3N!N%L>!{"
        "RelOu2gfHx`Fq%_0|0*2wUh"
    ),
    "r2017b": (
        "c-rG+APD}`0x-}V5N9<j!{7(B3|L7zIg5sXBA1nkiHHab3ju+kpr8OhKQAv2Hzy|t2Rl0(3kwS~6B8rD|9}7f{rUa#=Z|k+K7ai1"
        "_VvqWkM7>Qa{lD8!-o$aI&$LTy;mPTfBE|D=kMQtzJGl2==ROq_n*Fg|LNoV*Uul{zkm1Mz5Dm?-M)GG+|hkoRxh44ebL4Pm!E#)"
        "lreCLE@^LTX{;&BPm2rjb+xxLGch!@vb1sX3XV$3DypcisjaT5uBmHm>*}32ani*8zTWQcuCC6Gj<&XzriS{unyQNOlH!8goUF|B"
        ")a1n2=!no@APDrZ(i352{QvLopWi>e0-f>V*^|eQo;-W`=KaU7KY#ycVqxdv=H(X@5*8K~c_62(rm3l|si~o^uA#1}rK6{BXk=n)"
        "W@c_~ZUKZKU}kOx1|T5|3rkBYODiiYYik=jTRU4DD=Q12w5h3ysfn?Pk+BgF7#bMp>*?v~f{?DRj*hmr7RY#2RTU*AMFj;pIawJQ"
        "X(=g52?=p=F;O580TE)NVn6_7ivZ(-pO2TDixU_NtgOsT|Ns5@_4E7puU|fY`t;%bySHy%zk2!d<%<{3!QjP<7q4Eue)IPI$Ist>"
        "{Ql3#&LgF)Wo!;~rzO~xwzhUaU=K!iKnL4e+gMv!TUkQj>Duz5yqxUpoLnHt%1lj+jSLC!_H=Qyv$ilZHqzJC(b7~0I$S|sPDV;x"
        "OjwYQhnt&|3z$S$|9^Y`=GB|GZ(crs_Vmf)2X}5>yK?pV%{%w*-Mw???!Ehup1gSZ3h2`3PafR^$z42u_VlR}$B!O8a`@1}g9i`n"
        "-@k9)-o1PF?AZ+jJ9q8av3={7O&iy*TeE7#@?}dFEn2W(?%Y|^r%j$TapL63Q>RUzHf`#Z$&;r{oiTgfqGf9~Y~HqG*Z!mDZoT-*"
        "$R#8$qpWM@<Q*Il73OWLEA#&D)oa(T0>QQGx9;A5`1tXoM-Lx9di>-WFu0yRdT{5~jjNY0oH=>q;J&>8_dCP2"
    ),
}


@dataclass(frozen=True)
class Colormap:
    """A table of K colors, uint8 [K x 3]; color k stands for the scalar k / (K - 1), of equal colors the first one."""

    name: str
    table: np.ndarray

    def to_scalars(self, colors):
        """Return (scalars float32 [...], distances float32 [...]) of the nearest colors of the table.

        :param colors: uint8 [... x 3].
        """
        codes = _codes(colors)
        order, known = self._index
        position = np.searchsorted(known, codes).clip(max=len(known) - 1)
        entries, distances = order[position], np.zeros(codes.shape, np.float32)
        others = known[position] != codes
        if others.any():
            unique, inverse = np.unique(codes[others], return_inverse=True)
            far, nearest = self._tree.query(_colors(unique))
            entries[others], distances[others] = nearest[inverse], far[inverse]
        return (entries / (len(self.table) - 1)).astype(np.float32), distances

    def to_colors(self, scalars):
        """Return the nearest colors of the table, uint8 [... x 3], of scalars [...] in [0, 1]."""
        return self.table[np.rint(np.clip(scalars, 0, 1) * (len(self.table) - 1)).astype(np.intp)]

    def project(self, colors):
        """Return the nearest colors of the table.  uint8 [... x 3] -> same"""
        return self.to_colors(self.to_scalars(colors)[0])

    @functools.cached_property
    def _index(self):
        codes = _codes(self.table)
        order = np.argsort(codes, kind="stable")
        return order, codes[order]

    @functools.cached_property
    def _tree(self):
        from scipy.spatial import cKDTree

        return cKDTree(self.table.astype(np.float64))


def open_colormap(name: str) -> Colormap:
    """Return the table of this name, such as jet/matlab64; of a colormap the first one.

    :raises ValueError: if there is none.
    """
    return _candidates(name)[0]


def fit_colormap(colors, counts, name: str = "auto") -> Colormap:
    """Return the table that is nearest to colors on average, of equally near ones the first.

    :param colors: uint8 [n x 3], `counts`: pixels of each color [n].
    :param name: a table, a colormap, or auto for all of them.
    :raises ValueError: if there is no such table.
    """
    frequent = np.argsort(counts, kind="stable")[-MAX_FITTED:]
    means = [np.average(each.to_scalars(colors[frequent])[1], weights=counts[frequent]) for each in _candidates(name)]
    return _candidates(name)[int(np.argmin(means))]


def recognize_colormap(colors, counts) -> Colormap | None:
    """Return the table on which all colors lie, None if there is none or they are too few or too many for one."""
    if not MIN_COLORS <= len(colors) <= MAX_COLORS:
        return None
    best = fit_colormap(colors, counts)
    return best if best.to_scalars(colors)[1].max() <= EXACT_DISTANCE else None


def count_colors(images):
    """Return (colors uint8 [n x 3], pixels of each [n]) of a list of images uint8 [... x 3]."""
    codes, counts = np.unique(np.concatenate([_codes(image).ravel() for image in images]), return_counts=True)
    return _colors(codes), counts


def same_colormap(requested: str, recorded: str) -> bool:
    """Return whether a recorded table is one that a value of --colormap requests."""
    return bool(recorded) and requested in ("auto", recorded, recorded.partition("/")[0])


def _candidates(name):
    """Return the tables that a value of --colormap stands for."""
    # Any images of grayscale are on the inverted gray map, so that it has to be named.
    maps = [each for each in COLORMAPS if each != "gray_r"] if name == "auto" else [name.partition("/")[0]]
    tables = [table for each in maps if each in COLORMAPS for table in _tables(each)]
    chosen = [table for table in tables if "/" not in name or table.name == name]
    require((chosen, f"--colormap {name}: expected auto or one of: {', '.join(COLORMAPS)}; tables of "
                     f"{maps[0]}: {', '.join(table.name for table in tables) or 'none'}"))
    return chosen


@functools.cache
def _tables(name):
    """Return the `Colormap` of each table of a colormap, rounded and truncated to 8 bits."""
    tables = []
    for source, values in _sources(name):
        rounded, truncated = (convert(values * 255).astype(np.uint8) for convert in (np.rint, np.floor))
        tables.append(Colormap(f"{name}/{source}", rounded))
        if not np.array_equal(rounded, truncated):
            tables.append(Colormap(f"{name}/{source}-floor", truncated))
    return tables


def _sources(name):
    """Yield (name, colors float [K x 3] in [0, 1]) of the tables of a colormap."""
    import matplotlib

    if name == "gray_r":
        yield "linear256", np.linspace(1, 0, 256)[:, None].repeat(3, 1)
    elif name == "parula":
        for version, text in _PARULA.items():
            colors = _unpack(text)
            for count in (64, 256):
                at = np.linspace(0, len(colors) - 1, count)
                yield f"{version}-{count}", np.stack([np.interp(at, range(len(colors)), c) for c in colors.T], 1)
    else:
        yield "matplotlib", matplotlib.colormaps[name](np.arange(256))[:, :3]
    for count in (64, 256) if name in ("jet", "hot") else ():
        steps = np.arange(1, count + 1)
        if name == "jet":   # MATLAB starts one step later than OpenCV
            yield f"matlab{count}", _jet(steps / count)
            yield f"linear{count}", _jet(np.linspace(0, 1, count))
        else:
            third = 3 * count // 8
            ends = (0, third), (third, 2 * third), (2 * third, count)
            yield f"matlab{count}", np.stack([np.clip((steps - a) / (b - a), 0, 1) for a, b in ends], 1)


def _jet(values):
    """Return the colors of the piecewise linear jet at values [n] in [0, 1]."""
    return np.clip(1.5 - abs(4 * values[:, None] - np.array([3, 2, 1])), 0, 1)


def _unpack(text):
    """Return a table of `_PARULA`, float [K x 3]."""
    high, low = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8).reshape(2, -1).astype(np.uint16)
    return np.cumsum((high << 8 | low).astype(np.int16).reshape(3, -1), 1, np.int64).T / 1e4


def _codes(colors):
    """Return one int32 per 8-bit color.  [... x 3] -> [...]"""
    red, green, blue = np.moveaxis(np.asarray(colors).astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _colors(codes):
    """Return the colors of `_codes`, uint8.  [...] -> [... x 3]"""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)
