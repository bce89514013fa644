"""Pairs out of shards: each exactly once, from the start or from the middle, or a reason."""

import io
import json
import random
import tarfile
import tracemalloc

import pytest
import webdataset
from biomedica_fixtures import PANELS, key, members, pair, picture, special, tar_bytes, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.biomedica import pairs, sides
from scripts.biomedica.settings import HeldOutSettings, IndexSettings
from scripts.biomedica.tars import Bad, Raw, Reader, Resume, TarError, samples

FORMATS = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
BLOCK = 512


class Trickle(io.RawIOBase):
    """A stream that gives as little as it likes, as a connection does, and cannot seek."""

    def __init__(self, data, seed=0):
        self.stream, self.random = io.BytesIO(data), random.Random(seed)

    def read(self, size=-1):
        assert size > 0
        return self.stream.read(self.random.randint(1, size))


def read(data, resume=None, **options):
    """(items, state after each item with the first at the start, the error's text or None)"""
    reader = Reader(io.BytesIO(data[(resume or Resume()).offset :]), resume, **options)
    items, states = [], [reader.resume]
    try:
        for item in reader:
            items.append(item)
            states.append(reader.resume)
    except TarError as error:
        return items, states, str(error)
    return items, states, None


def check_restarts(data, **options):
    """From each state the rest follows, and the same error at the end."""
    items, states, error = read(data, **options)
    for number, state in enumerate(states):
        rest, _, same = read(data, Resume(*json.loads(json.dumps(state))), **options)
        assert rest == items[number:] and same == error
    return items, states, error


def plain(item):
    """key, image, text, json of a pair; key and the first words of the reason of another key."""
    return (item.key, item.reason.split(":")[0]) if isinstance(item, Bad) else tuple(item[:4])


def small(number, **changed):
    """A pair with data that no decoder has to read."""
    return pair(number, **{"jpg": bytes([number % 256]) * (700 * (number % 3) + number)} | changed)


# --- whole shards ---


def test_the_real_layout_reads_as_webdataset_does_with_offsets_as_tarfile_has_them(tmp_path):
    path = write_shard(tmp_path / "a.tar", map(pair, range(8)))
    found = list(samples(path.open("rb")))
    reference = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    assert [(one["__key__"], one["jpg"], one["txt"], one["json"]) for one in reference] == [one[:4] for one in found]
    with tarfile.open(path) as tar:
        at = {member.name: (member.offset_data, member.size) for member in tar}
    data, start = path.read_bytes(), 0
    for one in found:
        assert (one.image_at, one.text_at, one.meta_at) == tuple(
            at[f"{one.key}.{kind}"] for kind in ("jpg", "txt", "json")
        )
        assert one.start == start and one.end % BLOCK == 0
        start = one.end
    assert not data[start:].strip(b"\0")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_pair_is_given_once_however_keys_interleave_and_wherever_reading_restarts(data):
    count = data.draw(st.integers(1, 7))
    ones = [small(n, json=None if data.draw(st.booleans()) else {"n": n}) for n in range(count)]
    for one in ones:
        if data.draw(st.booleans()):
            one["__key__"] = f"folder/{'x' * data.draw(st.sampled_from([20, 99, 160, 300]))}/{one['__key__']}"
    content = [part for one in ones for part in members(one)]
    content += data.draw(st.lists(st.sampled_from([("README", b"x" * 600), ("a.bin", b""), ("b.seg.png", b"1")])))
    reach = data.draw(st.sampled_from([0, 2, 100]))  # how far members stray from their place
    order = sorted(range(len(content)), key=lambda i: i + data.draw(st.integers(0, reach)))
    raw = tar_bytes([content[i] for i in order], data.draw(st.sampled_from(FORMATS)))
    items, states, error = check_restarts(raw)
    assert error is None and all(isinstance(item, Raw) for item in items)
    wanted = {one["__key__"]: dict(members(one)) for one in ones}
    assert sorted(item.key for item in items) == sorted(wanted)
    for item in items:
        own = wanted[item.key]
        assert [item.image, item.text, item.meta] == [own.get(f"{item.key}.{kind}") for kind in ("jpg", "txt", "json")]
        for value, (at, size) in zip(item[1:4], item[6:], strict=True):
            assert raw[at : at + size] == (value or b"")
        with tarfile.open(fileobj=io.BytesIO(raw[item.start :])) as rest:  # begins with a whole header
            assert rest.next().name.startswith(item.key)
    assert [plain(one) for one in Reader(Trickle(raw, seed=count))] == [plain(one) for one in items]
    if reach == 0 and all("json" in one for one in ones):
        assert all(state.offset for state in states[1:])  # neighbours: nothing is read twice


def test_an_open_key_sends_a_restart_to_the_start_and_skips_what_was_given():
    first, late = small(1), small(2)
    content = [members(late)[0], *members(first), *members(small(3)), *members(late)[1:], *members(small(4))]
    raw = tar_bytes(content)
    items, states, _ = check_restarts(raw)
    assert [item.key for item in items] == [key(1), key(3), key(2), key(4)]
    assert [state[:2] for state in states[:3]] == [(0, 0), (0, 1), (0, 2)]
    assert states[3].offset == items[2].end and states[3].given == 3
    reader = Reader(io.BytesIO(raw))
    pending = [(reader.pending, item.key)[0] for item in reader]
    assert pending == [1, 1, 0, 0]


def test_of_a_key_without_json_the_pair_comes_at_the_end():
    raw = tar_bytes([*members(small(1, json=None)), *members(small(2))])
    items, _, _ = check_restarts(raw)
    assert [plain(item) for item in items] == [
        (key(2), small(2)["jpg"], b" Figure 2. \n", json.dumps(small(2)["json"]).encode()),
        (key(1), small(1)["jpg"], b" Figure 1. \n", None),
    ]
    assert items[1].meta_at == (0, 0)


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [("jpg", "no image"), ("txt", "no text"), (("jpg", "txt"), "no image and no text")],
)
def test_an_incomplete_key_is_bad_with_what_it_lacks(left_out, reason):
    odd = small(5, **dict.fromkeys([left_out] if isinstance(left_out, str) else left_out))
    items, _, error = check_restarts(tar_bytes([*members(odd), *members(small(6))]))
    assert items[1] == Bad(key(5), f"incomplete: {reason}") and items[0].key == key(6) and error is None


@pytest.mark.parametrize("ending", ["jpeg", "png", "webp", "JPG"])
def test_other_kinds_of_images_are_taken(ending):
    items, _, _ = read(tar_bytes([(f"./a.{ending}", b"1"), ("./a.TXT", b"2"), ("./a.json", b"{}")]))
    assert [plain(item) for item in items] == [("a", b"1", b"2", b"{}")]


# --- names, links, doubles ---


@pytest.mark.parametrize(
    ("odd", "own", "reason"),
    [
        (("/etc/passwd.jpg", b"x"), "/etc/passwd", "absolute name"),
        (("../../a.txt", b"x"), "../../a", "name with .."),
        (("x/../a.json", b"x"), "x/../a", "name with .."),
        (("..", b"x"), "..", "name with .."),
        (("a\nb.jpg", b"x"), "a\\nb", "name with control characters or not UTF-8"),
        (("a\udce4.jpg", b"x"), "a\\udce4", "name with control characters or not UTF-8"),
        (special("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), "l", "link"),
        (special("h.txt", tarfile.LNKTYPE, f"{key(0)}.txt"), "h", "link"),
        (special("d.jpg", tarfile.CHRTYPE), "d", "device"),
        (special("p", tarfile.FIFOTYPE), "p", "device"),
        (special("../folder", tarfile.DIRTYPE), "../folder", "name with .."),
    ],
)  # fmt: skip
def test_an_unsafe_member_is_bad_and_its_neighbours_are_not(odd, own, reason):
    content = [*members(small(0)), odd, *members(small(1))]
    items, _, error = check_restarts(tar_bytes(content))
    assert [item.key for item in items] == [key(0), own, key(1)] and error is None
    assert items[1] == Bad(own, reason)


def test_a_name_with_a_zero_byte_is_refused():
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"path": "a\0.jpg"}
    items, _, _ = read(tar_bytes([info], tarfile.PAX_FORMAT))
    assert items == [Bad("a\\x00", "name with control characters or not UTF-8")]


@pytest.mark.parametrize("place", range(4))
def test_a_key_with_a_link_is_refused_altogether_wherever_the_link_is(place):
    content = members(small(1))
    content.insert(place, special(f"{key(1)}.png", tarfile.SYMTYPE, "x"))
    items, _, _ = check_restarts(tar_bytes([*content, *members(small(2))]))
    kinds = [type(item) for item in items]
    assert items[-1].key == key(2)
    assert kinds == ([Bad, Raw] if place < 3 else [Raw, Bad, Raw])  # what was given cannot be taken back


def test_folders_are_passed_over():
    items, _, _ = read(tar_bytes([special("./x", tarfile.DIRTYPE), *members(small(1))]))
    assert [item.key for item in items] == [key(1)]


@pytest.mark.parametrize("between", [0, 3])
def test_a_key_that_comes_again_is_bad_once_and_a_restart_between_knows_it(between):
    content = [part for number in (1, *range(2, 2 + between), 1, 9) for part in members(small(number))]
    items, states, _ = check_restarts(tar_bytes(content))
    assert [plain(item)[1] == "duplicate key" for item in items] == [False] * (1 + between) + [True, False]
    assert all(state.offset for state in states[1 : 2 + between])


def test_two_images_of_an_open_key_are_ambiguous_and_refused():
    content = [(f"{key(1)}.png", b"1"), *members(small(1)), *members(small(2))]
    items, _, _ = check_restarts(tar_bytes(content))
    assert [plain(item)[:2] for item in items] == [(key(1), "duplicate key"), plain(items[1])[:2]]
    assert items[1].key == key(2)


# --- damage ---


def test_a_shard_cut_anywhere_gives_all_before_the_cut_and_then_an_error():
    raw = tar_bytes([part for number in range(4) for part in members(small(number))], ended=False)
    whole = [item for item in read(raw + bytes(2 * BLOCK))[0] if isinstance(item, Raw)]
    assert len(whole) == 4
    for cut in [*range(0, len(raw), 61), *range(0, len(raw) + 1, BLOCK)]:
        items, _, error = check_restarts(raw[:cut])
        pairs_given = [item for item in items if isinstance(item, Raw)]
        # the last member of a key is its text; a json that is cut away leaves the pair as one without
        assert pairs_given == [one for one in whole if one.end <= cut]
        assert error.startswith(f"truncated: it ends at byte {cut}")
        for bad in items[len(pairs_given) :]:
            assert bad.reason.startswith("incomplete: no ") and "the shard is damaged: truncated" in bad.reason
        started = {one.key for one in whole if one.start + BLOCK <= cut}
        assert {item.key for item in items} == started


def test_a_damaged_header_in_the_middle_is_no_end():
    raw = tar_bytes([part for number in range(3) for part in members(small(number))])
    start = read(raw)[0][1].start
    for broken in (raw[: start + 4] + b"\xff" + raw[start + 5 :], raw[:start] + b"x" * BLOCK + raw[start + BLOCK :]):
        items, _, error = check_restarts(broken)
        assert [item.key for item in items] == [key(0)] and error.startswith(f"damaged header at byte {start}")
        with tarfile.open(fileobj=io.BytesIO(broken), mode="r|") as tar:  # why its loop is not taken
            assert len(list(tar)) == 3


def test_pairs_behind_the_end_of_the_archive_are_not_lost_unseen():
    raw = tar_bytes(members(small(0)))
    items, _, error = check_restarts(raw + tar_bytes(members(small(1))))
    assert len(items) == 1 and "more than zeros follow" in error
    assert read(raw + bytes(9 * BLOCK))[2] is None


def test_an_empty_file_and_one_that_is_no_tar():
    assert read(b"")[2].startswith("truncated: it ends at byte 0")
    assert read(b"<html>" * 200)[2].startswith("damaged header at byte 0")
    assert read(bytes(2 * BLOCK)) == ([], [Resume()], None)


def huge(size):
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [2**40, 400 * 2**20])
def test_a_header_that_lies_about_its_size_takes_no_memory(size):
    tracemalloc.start()
    items, _, error = read(huge(size) + b"x" * 5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error and peak < 4 * 2**20
    assert [item.key for item in items] == ([] if size == 2**40 else ["a"])


def test_a_negative_size_and_a_long_name_without_end_are_damage():
    assert "size -5" in read(huge(-5))[2]
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    assert "a name or PAX header of" in read(info.tobuf(tarfile.GNU_FORMAT))[2]


@pytest.mark.parametrize("records", [b"9 path=ab", b"99 path=a\n", b"x path=a\n", b"7 path=\0", b"0 path=a\n"])
def test_a_damaged_pax_header_is_damage(records):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    raw = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(BLOCK, b"\0") + tar_bytes([("a.jpg", b"")])
    assert "PAX header" in read(raw)[2]


def test_a_header_that_nothing_follows_is_damage():
    raw = tar_bytes([("x" * 120 + ".jpg", b"1")])
    assert "the archive ends after a long name" in read(raw[: 2 * BLOCK] + bytes(2 * BLOCK))[2]


def test_sparse_files_and_global_names_are_refused():
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    assert read(tar_bytes([info], tarfile.PAX_FORMAT))[0] == [Bad("a", "sparse file")]
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    assert "a sparse file at byte 0" in read(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))[2]
    for pax, good in (({"comment": "x"}, True), ({"path": "y"}, False)):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax):
            pass
        assert (read(file.getvalue())[2] is None) is good


def test_a_resumed_shard_that_is_another_one_is_found_out():
    raw, other = (tar_bytes([part for n in range(count) for part in members(small(n, json=None))]) for count in (3, 1))
    state = read(raw)[1][2]
    assert state == Resume(0, 2)
    assert "is another shard" in read(other, state)[2]


# --- memory ---


def test_a_shard_without_any_json_takes_bounded_memory_and_gives_all():
    size, count = 20_000, 60
    raw = tar_bytes([part for n in range(count) for part in members(pair(n, jpg=bytes([n]) * size, json=None))])
    items, _, error = check_restarts(raw, max_pending=10 * size)
    assert [item.key for item in items] == [key(n) for n in range(count)] and error is None
    tracemalloc.start()
    for item in Reader(io.BytesIO(raw), max_pending=10 * size):
        del item
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * size


def test_too_much_that_never_becomes_a_pair_is_an_error():
    raw = tar_bytes([(f"{n}.jpg", b"x" * 1000) for n in range(30)])
    items, _, error = check_restarts(raw, max_pending=10_000)
    assert error.startswith("over 10000 bytes of incomplete pairs at byte")
    assert [item.key for item in items] == [str(n) for n in range(10)]


# --- sides ---


def test_an_article_is_the_accession_of_its_key():
    for name, article in (
        ("12-PMC1234567-3-ab-cd", "PMC1234567"), ("x/12-PMC7-0-a", "PMC7"), ("figure_1", "figure_1"),
        ("a-b", "a-b"), ("1--2-3", "1--2-3"),
    ):  # fmt: skip
        assert sides.article_of(name) == article


def test_sides_follow_from_seed_and_article_alone_at_the_wanted_shares():
    values = HeldOutSettings(validation=0.1, test=0.3)
    of = [sides.side_of(f"PMC{n}", values) for n in range(4000)]
    assert [of.count(side) / 4000 for side in sides.SIDES] == pytest.approx([0.6, 0.1, 0.3], abs=0.03)
    assert of == [sides.side_of(f"PMC{n}", values) for n in range(4000)]
    assert of != [sides.side_of(f"PMC{n}", HeldOutSettings(validation=0.1, test=0.3, seed=7)) for n in range(4000)]
    # more held out takes none of those that were back into train
    assert all(sides.side_of(f"PMC{n}", HeldOutSettings(validation=0.2, test=0.3)) != "train"
               for n in range(4000) if of[n] != "train")  # fmt: skip


# --- what is usable ---


def raw_of(decode=True, index=None, **changed):
    one = pair(7, **changed)
    items = list(samples(io.BytesIO(tar_bytes(members(one)))))
    return pairs.check(items[0], index or IndexSettings(), HeldOutSettings(), decode)


def test_a_good_pair_has_all_that_training_needs():
    found = raw_of()
    assert found == pairs.Pair(
        key(7), "PMC1002", sides.side_of("PMC1002", HeldOutSettings()), "Figure 7.", found.caption_id, picture(7), 32,
        24, PANELS[1], "x",
    )  # fmt: skip
    assert raw_of(decode=False) == found
    assert raw_of(txt="Figure 7.").caption_id == found.caption_id != raw_of(txt="Figure 8.").caption_id
    assert found.caption_id == int.from_bytes(bytes.fromhex("2f653c66d9b6519d"), signed=True)


CUT = picture(7)[:-200]


@pytest.mark.parametrize(
    ("changed", "status", "reason"),
    [
        ({"txt": " \n"}, "rejected", "empty caption"),
        ({"txt": "No caption found\n"}, "rejected", "no caption: No caption found"),
        ({"jpg": picture(7, (20, 300))}, "rejected", "small image: 20x300"),
        ({"jpg": picture(7, (1, 1))}, "rejected", "small image: 1x1"),
        ({"jpg": picture(7, (300, 20), "PNG")}, "rejected", "small image: 300x20"),
        ({"txt": b"caf\xe9"}, "quarantined", "caption not UTF-8: byte 3 of 4"),
        ({"json": b"{"}, "quarantined", "json: "),
        ({"json": b"\xff{}"}, "quarantined", "json: "),
        ({"json": b"[" * 100_000}, "quarantined", "json: "),
        ({"json": []}, "quarantined", "json: expected an object, got a list"),
        ({"jpg": b""}, "quarantined", "image: empty file"),
        ({"jpg": b"GIF89a"}, "quarantined", "image: not an image"),
        ({"jpg": CUT}, "quarantined", "image: truncated or corrupt"),
    ],
)
def test_a_pair_that_cannot_be_used_has_a_status_and_a_reason(changed, status, reason):
    found = raw_of(**changed)
    assert (found.key, found.status) == (key(7), status) and found.reason.startswith(reason)


def test_limits_are_those_of_the_settings():
    assert isinstance(raw_of(jpg=picture(7, (21, 21))), pairs.Pair)
    assert raw_of(index=IndexSettings(min_side=25)).reason == "small image: 32x24, a side under 25"
    assert raw_of(index=IndexSettings(max_pixels=700)).reason.startswith("image: over-large: 32x24")
    assert raw_of(index=IndexSettings(no_caption=("Figure 7.",))).reason == "no caption: Figure 7."
    assert isinstance(raw_of(decode=False, jpg=CUT), pairs.Pair)  # its header is whole


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "unknown"), ("", "unknown"), (" a ", "a"), (["a", "b "], "a, b"), ([], "unknown"), (3, "unknown")],
)
def test_panel_types_that_the_json_does_not_say_are_unknown(value, name):
    assert raw_of(json={"image_panel_type": value}).panel_type == name
    assert raw_of(json=None).panel_type == "unknown"
