"""Which files of which Debian packages are sound effects, and how their names become captions.

The rule: a name is split at case changes and at whatever is no letter; digits, single letters (notes, channels) and
the words listed with ``""`` below (code names, strokes of a tabla, how hard a drum was struck) are dropped;
abbreviations and foreign words are spelled in English; what is left is the caption, in lower case, every word once. A
name of which nothing is left is left out, and so are whole folders and names that say when a sound is played and not
what it is, spoken words, waveforms of one cycle, and test tones. A stamp of Tux Paint has its English text instead,
without article and full stop, if it is of at most eight words: longer ones explain and do not name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PACKAGES", "Effect", "Package", "scan"]

GPL_2 = "GPL-2.0-or-later"
MAX_WORDS = 8


@dataclass(frozen=True)
class Package:
    """Sound effects of one Debian package: files below ``folder`` whose path there does not match ``skip``.

    ``words`` spells the words of a name (over those of ``WORDS``), ``names`` whole names, and ``folders`` adds a word
    for the folder. ``licences`` are tried in order: a pattern of the path, and the licence of what it matches.
    ``sha256`` is of the files and ids (``check_media`` of ``build_sound_effects.py``).
    """

    name: str
    version: str
    sha256: str
    folder: str
    licences: Mapping[str, str]
    skip: str = r"(?!)"
    words: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effect:
    """One sound effect: ``id`` is the package and the path below its folder, without suffix."""

    id: str
    caption: str
    package: Package
    licence: str
    audio: Path
    image: Path | None = None


def dropped(words: str) -> dict[str, str]:
    return dict.fromkeys(words.split(), "")


#: Words of file names, spelled for a reader; "" is left out.
WORDS = {
    "accord": "chord", "afro": "african", "bassdrum": "bass drum", "bassslap": "slap bass", "beatbox": "beat box",
    "cembalo": "harpsichord", "clap": "hand clap", "clav": "claves", "clave": "claves", "cymbaly": "cimbalom",
    "dijjeridoo": "didgeridoo", "e": "electric", "explode": "explosion", "explos": "explosion",
    "fencegate": "fence gate", "guit": "guitar", "hat": "hi-hat", "hi": "high", "hihat": "hi-hat", "kick": "kick drum",
    "klavichord": "clavichord", "kongas": "congas", "lo": "low", "opened": "open", "perc": "percussion",
    "pisk": "whistle", "rim": "rim shot", "rimshot": "rim shot", "sidestick": "side stick", "snaph": "finger snap",
    "snare": "snare drum", "sparcle": "sparkle", "synth": "synthesizer", "tom": "tom drum", "violoncello": "cello",
    "woosh": "whoosh", "xylo": "xylophone", "xylofon": "xylophone",
}  # fmt: skip

STAMPS = Package(
    "tuxpaint-stamps-default", "2022.06.04-1", "8414143868a191b496b9392a62acee93cda44742a30a4c05250457915e14b484",
    "usr/share/tuxpaint/stamps", {"": GPL_2},
    # Letters, numbers and faces are spoken; the texts of flags, road signs and of a memorial name no sound.
    skip=r"^symbols/|_desc(_\w+)?$|^town/(flags|roadsigns)/|^military/",
)  # fmt: skip

PACKAGES = (
    STAMPS,
    Package(
        "sonic-pi-samples", "3.2.2~repack-8", "f24d5ff67fd6d70f60d1e30b31ff84a66aaf82d20d24e4f6c7f1a5cecf732e0d",
        "usr/share/sonic-pi/samples", {"": "CC0-1.0"},
        words={
            "ambi": "ambient", "bd": "bass drum", "elec": "electric", "filt": "filtered", "haus": "house",
            "sn": "snare drum", "drum": "", "misc": "", "cineboom": "cinematic boom", "splash": "splash cymbal",
            "rub": "rubbed", "tek": "techno", "klub": "club", "till": "cash till",
            **dropped(
                "ada dolf gas sone zome zum mehackit compus garzul mika amen weirdo em fifths"
                " dhec ghe ke na re tas te tun ne generic full"
            ),
        },
        names={
            "bass_dnb_f": "drum and bass", "drum_bass_hard": "bass drum hard", "drum_bass_soft": "bass drum soft",
            "drum_roll": "drum roll",
        },
    ),
    Package(
        "scratch", "1.4.0.6~dfsg1-6.1", "60ea61c703add14baf5448a9570c016f7271598043136c5ce9abf610c827a474",
        "usr/share/scratch/Media/Sounds", {"": "CC-BY-SA-3.0"},
        skip=r"^Vocals/(?!Singer|BeatBox)|^Music Loops/(Cave|Eggs|Garden|Triumph|Jungle)",
        words={"dirty": "", "peculiar": "", "set": "kit"},
        names={"CymbalCrash": "crash cymbal"},
        folders={"Music Loops": "loop"},
    ),
    Package(
        "lmms-common", "1.2.2+dfsg1-6", "36e80b33329f484fad4880cde903bb84b58305f114ab0589661e3dcc1fa625dc",
        "usr/share/lmms/samples", {"": GPL_2},
        skip=r"^(shapes|waveforms)/|^misc/(undefined|hit)|^drums/nasty_bass|^effects/(chroma|start|stop)",
        words={
            "crash": "crash cymbal", "juno": "synthesizer", "korg": "synthesizer", "matrix": "synthesizer",
            "metalish": "metallic", "nord": "synthesizer", "orion": "synthesizer", "ride": "ride cymbal",
            "wood": "wood block", **dropped("briff nasty poly tb"),
        },
        folders={"basses": "bass", "bassloops": "bass loop", "beats": "beat"},
    ),
    Package(
        "hydrogen-data", "1.2.0~beta1+dfsg-1", "cebd742b997aa5a13eef2f6c54afe8fb13401514cd524e2cfa29c0beb172d924",
        "usr/share/hydrogen/data", {"": GPL_2},
        skip=r"^emptySample",
        words={
            "bell": "ride cymbal bell", "crash": "crash cymbal", "ride": "ride cymbal", "splash": "splash cymbal",
            **dropped("hard hardest med soft softest"),
        },
    ),
    Package(
        "minetest-data", "5.6.1+dfsg+~1.9.0mt8+dfsg-2",
        "38d6b15c36c73988667bfd449c3e23a8ed17ad51e15e111bc01535f6418d4b1d",
        "usr/share/games/minetest/games/minetest_game/mods",
        {"^tnt/|doors_glass_door": "CC0-1.0", "^doors/": "CC-BY-3.0", "": "CC-BY-SA-3.0"},
        # The game's own classes of blocks.
        skip=r"_node|dig_(oddly|dig_immediate|cracky|crumbly|snappy|choppy)|hard_footstep|player_damage|item_smoke",
        words={
            "tnt": "", "default": "", "env": "", "sounds": "", "carts": "", "doors": "", "xpanes": "",
            "cool": "cooling", "dig": "digging", "dug": "digging", "breaks": "breaking", "break": "breaking",
            "active": "", "moving": "", "extinguish": "extinguished",
        },
    ),
    Package(
        "libreoffice-common", "4:7.4.7-1+deb12u14", "78bebebe4797da83221e40acb73e7338838a1ae0323140d39d7f52d0fdf0c424",
        "usr/lib/libreoffice/share/gallery/sounds", {"": "MPL-2.0"},
        skip=r"^(apert|curve|left|ok|roll|romans|soft|strom|theetone|top|untie|ups|wallewal|kling)\d?$",
    ),
    Package(
        "sound-icons", "0.1-8", "15c9fb2079eb3b0723fdf745b2446d51c0f50cf361ecd8ca2f5ff5f2752e95f6",
        "usr/share/sounds/sound-icons", {"": GPL_2},
        skip=r"^prompt",
        words={"cink": "clink", "gentleman": "", "gummy": "toy"},
    ),
)  # fmt: skip


def scan(root: Path) -> Iterator[Effect]:
    """Sound effects below ``root``, where the packages were extracted to, by package and path.

    Raises FileNotFoundError for a package that is not there.
    """
    for package in PACKAGES:
        folder = root / package.folder
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} does not exist; get it with: apt-get download {package.name} && dpkg-deb -x "
                f"{package.name}_*.deb {root}"
            )
        for audio in sorted(p for p in folder.rglob("*") if p.suffix in {".ogg", ".wav", ".flac", ".mp3"}):
            name = audio.relative_to(folder).with_suffix("").as_posix()
            caption = _stamp_caption(audio) if package is STAMPS else _name_caption(name, package)
            if caption and not re.search(package.skip, name):
                licence = next(licence for path, licence in package.licences.items() if re.search(path, name))
                yield Effect(f"{package.name}/{name}", caption, package, licence, audio, _picture(audio))


def _stamp_caption(audio: Path) -> str:
    text = audio.with_suffix(".txt")
    if not text.is_file() or not (lines := text.read_text(encoding="utf-8").splitlines()):
        return ""
    caption = re.sub(r"^(an?|the)\s+|[.!]$", "", lines[0].strip().lower())
    return caption if len(caption.split()) <= MAX_WORDS else ""


def _name_caption(name: str, package: Package) -> str:
    folder, _, stem = name.rpartition("/")
    if stem in package.names:
        return package.names[stem]
    found: list[str] = []
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", stem):
        spelled = package.words.get(word.lower(), WORDS.get(word.lower(), word.lower()))
        if len(spelled) > 1:
            found.append(spelled)
    added = package.folders.get(folder.rpartition("/")[2], "")
    return " ".join(dict.fromkeys(" ".join([*found, added]).split())) if found else ""


def _picture(audio: Path) -> Path | None:
    return next((p for suffix in (".png", ".svg") if (p := audio.with_suffix(suffix)).is_file()), None)
