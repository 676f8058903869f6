"""Lists and heaps of the kernel, all in flat arrays.

A linked list of requests has its head, tail and count at ``mem[at]`` and the two places after; a
request is in one list at a time. A heap has its length first and its entries after.
"""

from oserve.sim.compiled import compiled
from oserve.sim.layout import NEVER, NEXT, NONE, PREVIOUS, PRIORITY, REQUEST
from oserve.sim.state import Flat


@compiled
def insert_before(req: Flat, mem: Flat, at: int, request: int, before: int) -> None:
    """Insert into a list before one of its members, or at its end with ``NONE``."""
    previous = mem[at + 1] if before == NONE else req[before * REQUEST + PREVIOUS]
    req[request * REQUEST + PREVIOUS] = previous
    req[request * REQUEST + NEXT] = before
    if previous == NONE:
        mem[at] = request
    else:
        req[previous * REQUEST + NEXT] = request
    if before == NONE:
        mem[at + 1] = request
    else:
        req[before * REQUEST + PREVIOUS] = request
    mem[at + 2] += 1


@compiled
def unlink(req: Flat, mem: Flat, at: int, request: int) -> None:
    """Remove from the list that it is in."""
    following = req[request * REQUEST + NEXT]
    previous = req[request * REQUEST + PREVIOUS]
    if previous == NONE:
        mem[at] = following
    else:
        req[previous * REQUEST + NEXT] = following
    if following == NONE:
        mem[at + 1] = previous
    else:
        req[following * REQUEST + PREVIOUS] = previous
    mem[at + 2] -= 1


@compiled
def sooner(req: Flat, field: int, one: int, other: int) -> bool:
    """Whether one request precedes another by a field, then by number, the order of arrival."""
    first, second = req[one * REQUEST + field], req[other * REQUEST + field]
    return first < second or (first == second and one < other)


@compiled
def insert_ordered(req: Flat, mem: Flat, at: int, request: int) -> None:
    """Insert into a list in order of priority."""
    before = NONE
    last = mem[at + 1]
    while last != NONE and sooner(req, PRIORITY, request, last):
        before = last
        last = req[last * REQUEST + PREVIOUS]
    insert_before(req, mem, at, request, before)


@compiled
def push(req: Flat, heap: Flat, at: int, field: int, request: int) -> None:
    """Push to the heap at ``at``, of requests ordered by a field."""
    place = heap[at]
    heap[at] = place + 1
    first = at + 1
    while place > 0:
        above = (place - 1) >> 1
        if sooner(req, field, heap[first + above], request):
            break
        heap[first + place] = heap[first + above]
        place = above
    heap[first + place] = request


@compiled
def pop(req: Flat, heap: Flat, at: int, field: int) -> int:
    """Pop the first of a heap."""
    first = at + 1
    found = heap[first]
    length = heap[at] - 1
    heap[at] = length
    request = heap[first + length]
    place = 0
    while True:
        below = 2 * place + 1
        if below >= length:
            break
        if below + 1 < length and sooner(req, field, heap[first + below + 1], heap[first + below]):
            below += 1
        if sooner(req, field, request, heap[first + below]):
            break
        heap[first + place] = heap[first + below]
        place = below
    heap[first + place] = request
    return found


@compiled
def withdraw(req: Flat, heap: Flat, at: int, field: int, request: int) -> None:
    """Remove a request from the heap that it is in."""
    key = req[request * REQUEST + field]
    req[request * REQUEST + field] = -NEVER
    first = at + 1
    place = 0
    while heap[first + place] != request:
        place += 1
    while place > 0:
        above = (place - 1) >> 1
        heap[first + place] = heap[first + above]
        place = above
    heap[first] = request
    pop(req, heap, at, field)
    req[request * REQUEST + field] = key
