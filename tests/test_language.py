"""The project's language: words that no paper and no other project uses do not come back.

`PROSE` is searched in comments, docstrings, other strings and text files, `ANYWHERE` in names too. A line that must
keep an old spelling, such as an entry in a table of aliases, is marked `# alias`.
"""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".py"}
ANYWHERE = [
    r'"""(What|Where|How) ',
    r"picture",
    r"\bgrey|colour|neighbour|normalis|optimis|minimis|synchronis|labell|\bcentre|\bmetres?\b|licence|learnt|spelt|spoilt|judgement",
    r"\b_?told\b",
    r"\brivals?\b|\bjudge[sd]?\b|heeded",
    r"forget_all_but|begin_with|begun_with|as_trained|codec_of|space_of|solver_of|sampler_from|in_words|\bsay\(|say_source",
    r"\b(MOST_|LEAST_|SMALLEST|FAINTEST|MAKING|OURS)\w*",
]
PROSE = [
    r"\bpictures?\b",
    r"\bdata sets?\b|\bsub-folders?\b|\btowards\b|\bdown-and-up\b",
    r"\b(leave|leaves|leaving) (it|them|one|the flag|--\w+).{0,30}? away\b|\bleft away\b",
    r"\bneeded (is|are)\b|\b(possible|known) are\b",
    r"\b(is|are) not there\b|\bthere already\b",
    r"\bwants?\b",
    r"\bgive (--|one of them|it|them|the first)",
    r"\btwo ways to one end\b|\btwo names for one\b",
    r"\bit is (at least|at most|a (finite )?number|odd)\b",
    r"\b(mend|take it out|cannot be had|can be had)\b",
    r"\(say \d+|, say[:,]",
    r"\b(is|are|was|be|been) told\b|\bwhat the (model|network) is told\b",
    r"\bheed(s|ed)?\b|\bdescends? on\b|\bhalvings?\b|\bbricks?\b|\bknobs?\b",
    r"\bcoins?\b(?! \{)",
    r"\bbend(s|ing)?\b|\bbent\b",
    r"\b(go|goes|going|went) on (where|from|with|in|to)\b|\bgoing on\b|\bgoes on\b",
    r"\banew\b|\bafresh\b|\bbegin(s|ning)? (with|anew)\b",
    r"\b(held|hold|holds) (samples )?against\b",
    r"\btaken for\b|\basked for\b",
    r"\b(shrunk|shrinks?|enlarg(e|ed|es|ing|ement))\b",
    r"\bsmall pictures?\b|\bthe small ones\b",
    r"\bwith commas between\b|\bcomma separated\b",
    r"\bin (the )?place of\b|\bbut for\b|\bfor want of\b|\bat hand\b|\bif wished\b",
    r"\bshall\b|\bnobody\b|\bwhoever\b",
    r"\brefus(e|ed|es|al|als|ing)\b",
    r"\b(slowest|fastest) (moving )?average\b|\baveraged weights\b",
    r"\bto the bit\b|\bfor ever\b|\bon the wall\b",
    r"\d %",
]
# Strings that seed random numbers (`data.batching`), aliases, a file of earlier releases, and the name of a loss as
# MONAI and papers have it.
EXEMPT = re.compile(r"# alias|permutation \{|coins \{|making\.json|least_squares")


def prose(source):
    """Return the comments and strings of Python source in order; code between them is a line break."""
    parts = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if EXEMPT.search(token.line) and "\n" not in token.string:
            parts.append("\n")
        elif token.type == tokenize.COMMENT:
            parts.append(token.string.lstrip("# "))
        elif token.type == tokenize.STRING or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1):
            parts.append(token.string.strip("rbfuRBFU").strip("\"'"))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            parts.append("\n")
    return re.sub(r"\s+", " ", " ".join(parts))


def hits(path):
    """Return the forbidden words in a file, each with its surroundings."""
    text = path.read_text()
    everything = re.sub(r"\s+", " ", "\n".join(line for line in text.splitlines() if not EXEMPT.search(line)))
    words = prose(text) if path.suffix == ".py" else everything
    return [where[max(0, hit.start() - 30):hit.end() + 30]
            for patterns, where in ((ANYWHERE, everything), (PROSE, words))
            for pattern in patterns for hit in re.finditer(pattern, where, re.IGNORECASE)]


def tracked_files():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split("\n") if done.returncode == 0 else []
    return [ROOT / name for name in names if Path(name).suffix in SUFFIXES and Path(name).name != Path(__file__).name]


def test_files_use_the_words_of_the_field():
    files = tracked_files()
    if not files:
        pytest.skip("not a git checkout")
    found = {str(path.relative_to(ROOT)): hits(path) for path in files if path.is_file()}
    assert {name: words[:3] for name, words in found.items() if words} == {}


def test_old_words_are_noticed_in_prose_and_names_and_aliases_are_exempt(tmp_path):
    path = tmp_path / "file.py"
    path.write_text('"""Give it a picture."""\nrival = 1\nx = "grey"  # alias\n')
    assert len(hits(path)) == 4
