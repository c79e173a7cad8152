"""Colour profiles written byte by byte from ICC.1:2001-04, and the formulas for what they mean."""

import struct

import numpy as np

# Chromaticities (x, y) of red, green and blue; white is D65.
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
D65, D50 = np.array([0.95047, 1.0, 1.08883]), np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def linear(values):
    """Linear light in [0, 1] of sRGB levels in [0, 255] (IEC 61966-2-1)."""
    values = np.asarray(values, float) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def levels(light):
    """sRGB levels in [0, 255] of linear light, which is clipped to [0, 1]."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_xyz(primaries):
    """The matrix from linear RGB to XYZ relative to D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, D65)


def adapted(xyz, white, to):
    """Bradford's adaptation of the last axis from one white to another."""
    gains = (_BRADFORD @ to) / (_BRADFORD @ white)
    return xyz @ (np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD).T


def lab_to_srgb(lab):
    """sRGB levels (..., 3) of CIE L*a*b* relative to D50."""
    lab = np.asarray(lab, float)
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return levels(adapted(xyz, D50, D65) @ np.linalg.inv(to_xyz(SRGB)).T)


def p3_to_srgb(pixels):
    """sRGB levels of Display P3's: the light of one in XYZ is the light of the other."""
    return levels(linear(pixels) @ to_xyz(DISPLAY_P3).T @ np.linalg.inv(to_xyz(SRGB)).T)


def matrix_profile(primaries, curve=None):
    """A profile of a screen; `curve` is its linear light at equidistant levels, sRGB's at 1024 if None."""
    curve = linear(np.linspace(0, 255, 1024)) if curve is None else curve
    xyz = adapted(to_xyz(primaries).T, D65, D50)
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", xyz, strict=True)}
    return _profile("mntr", "RGB ", "XYZ ", tags | {f"{name}TRC": _curve(curve) for name in "rgb"})


def grey_profile(curve):
    return _profile("mntr", "GRAY", "XYZ ", {"kTRC": _curve(curve)})


def cmyk_profile(lab):
    """A profile of a printer: `lab` (2, 2, 2, 2, 3) are the colours without and with all of each ink."""
    table = np.rint(np.asarray(lab) * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    ramp = bytes(range(256))
    head = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0)
    return _profile("prtr", "CMYK", "Lab ", {"A2B0": head + matrix + 4 * ramp + table.tobytes() + 3 * ramp})


def _xyz(values):
    return b"XYZ \0\0\0\0" + _fixed(values)


def _fixed(values):
    return struct.pack(">3i", *np.rint(np.asarray(values) * 65536).astype(int))


def _curve(values):
    values = np.rint(np.asarray(values) * 65535).astype(">u2")
    return struct.pack(">4s4xI", b"curv", len(values)) + values.tobytes()


def _profile(device, space, connection, tags):
    tags = {"wtpt": _xyz(D50)} | tags
    body, table, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), place + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = place + len(body)
    kinds = (device.encode(), space.encode(), connection.encode())
    head = struct.pack(">I4sI4s4s4s12x4s28x", size, b"test", 0x02400000, *kinds, b"acsp") + _fixed(D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
