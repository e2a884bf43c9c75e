"""A cache against a dict: stored, damaged, removed and reopened in whatever order, and no other byte comes out."""

import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from asyncds.cache import INLINE_LIMIT, Cache
from asyncds.entry import NewEntry, entry_key, object_id

OBJECTS = st.sampled_from([object_id("http://store", "bucket", f"train/{n}") for n in range(5)])
ETAGS = st.sampled_from(["v1", "v2"])
BODIES = st.one_of(st.binary(max_size=100), st.integers(0, 255).map(lambda byte: bytes([byte]) * (INLINE_LIMIT + byte)))


DAMAGES = st.sampled_from(["flip", "cut", "empty", "unlink", "swap"])
NUMBERS = st.tuples(*[st.integers(0, 1 << 16)] * 3)  # of two files, whose names are random, and of a byte


class CacheAgainstDict(RuleBasedStateMachine):
    """`stored` is what the cache may return; a key in `lost` may also be a miss."""

    keys = Bundle("keys")

    @initialize()
    def begin(self):
        self.place = tempfile.mkdtemp()
        self.caches = [Cache(self.place), Cache(self.place)]  # as two datasets of one process have them
        self.stored, self.lost = {}, set()

    @rule(target=keys, object=OBJECTS, etag=ETAGS, body=BODIES, which=st.integers(0, 1))
    def put(self, object, etag, body, which):
        key = entry_key(object, etag)
        body = self.stored.get(key, body)  # a version of an object is always the same bytes
        assert self.caches[which].put_many([NewEntry(object, etag, body)], "tag") == 1
        self.stored[key] = body
        return key

    @rule(some=st.lists(keys, max_size=5), which=st.integers(0, 1))
    def get(self, some, which):
        for key, entry in zip(some, self.caches[which].get_many(some, "tag"), strict=True):
            if entry is not None:
                assert entry.body == self.stored[key]
            else:
                assert key in self.lost

    @rule(key=keys)
    def remove(self, key):
        self.caches[0].remove([key])
        self.lost.add(key)

    @rule(how=DAMAGES, numbers=NUMBERS)
    def damage(self, how, numbers):
        files = sorted(path for path in self.caches[0]._folder.objects.glob("??/*.obj"))
        if not files:
            return
        path, other = (files[number % len(files)] for number in numbers[:2])
        content = path.read_bytes()
        if how == "unlink":
            path.unlink()
        elif how == "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            place = numbers[2] % max(1, len(content))
            flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if content else b""
            path.write_bytes({"flip": flipped, "cut": content[:place], "empty": b""}[how])
        self.lost |= {key for key, body in self.stored.items() if len(body) >= INLINE_LIMIT}

    @rule(which=st.integers(0, 1))
    def reopen(self, which):
        self.caches[which].close()
        self.caches[which] = Cache(self.place)

    @rule()
    def fork(self):
        child = os.fork()
        if child == 0:
            entries = self.caches[1].get_many(list(self.stored))
            right = all(e is None or e.body == body for e, body in zip(entries, self.stored.values(), strict=True))
            os._exit(not right)
        assert os.waitpid(child, 0)[1] == 0

    @invariant()
    def is_bounded_by_what_was_stored(self):
        if hasattr(self, "caches"):
            assert len(self.caches[0]) <= len(self.stored)

    def teardown(self):
        if hasattr(self, "caches"):
            self.caches[0].get_many(list(self.stored))
            self.caches[0].check(fix=True)
            assert self.caches[1].check() == {}
            for cache in self.caches:
                cache.close()
            shutil.rmtree(self.place)


TestCacheAgainstDict = CacheAgainstDict.TestCase
TestCacheAgainstDict.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
