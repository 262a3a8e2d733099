"""The prompts that a decoder has read, while rows continue them."""

from bisect import bisect_left


class Prompts:
    """Which prompts stand in the cache, and where: rising numbers at rising places."""

    def __init__(self) -> None:
        self.last_opened = 0
        self._num_read = 0
        self._first = 0  # places before it are free
        self._numbers: list[int] = []  # at each place from the first on
        self._lengths: list[int] = []

    def length_of(self, number: int) -> int:
        return self._lengths[bisect_left(self._numbers, number)]

    def forget_leading(self, owners: list[int]) -> None:
        """Those at the start that no row continues, nor ever will."""
        needed = min(owners[0], self.last_opened) if owners else self.last_opened
        gone = bisect_left(self._numbers, needed)
        del self._numbers[:gone], self._lengths[:gone]
        self._first += gone

    def are_full(self, lengths: list[int], places: int, length: int) -> bool:
        """Whether more prompts of these lengths need other places than there are."""
        return max(lengths) > length or self._first + len(self._numbers) + len(lengths) > places

    def move_to_the_start(self, owners: list[int]) -> list[int]:
        """Forget all that no row continues, nor ever will; the places where the others stood."""
        continued = set(owners)
        stay = [i for i, x in enumerate(self._numbers) if x in continued or x >= self.last_opened]
        places = [self._first + i for i in stay]
        self._numbers = [self._numbers[i] for i in stay]
        self._lengths = [self._lengths[i] for i in stay]
        self._first = 0
        return places

    def sizes(self, lengths: list[int], places: int) -> tuple[int, int]:
        """(places, length) of a buffer for what is here and for more prompts of these lengths."""
        needed = len(self._numbers) + len(lengths)
        # The first buffer fits; later ones leave room, so that few reads move what is there.
        places = max(places, needed + needed // 2) if places else needed
        return places, max([*lengths, *self._lengths])

    def add(self, lengths: list[int]) -> int:
        """More prompts; returns the place of the first of them."""
        place = self._first + len(self._numbers)
        self._numbers += range(self._num_read, self._num_read + len(lengths))
        self._lengths += lengths
        self._num_read += len(lengths)
        return place

    def in_use(self, owners: list[int]) -> tuple[slice, list[int], list[int]]:
        """The places, the length of each one's prompt, and [P + 1] where the rows of each begin."""
        places = slice(self._first, self._first + len(self._numbers))
        bounds = [bisect_left(owners, number) for number in self._numbers]
        return places, self._lengths, [*bounds, len(owners)]
