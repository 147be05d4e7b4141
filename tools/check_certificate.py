"""Check a certificate with the standard library alone: python tools/check_certificate.py CERTIFICATE.json

Exit code 0: all that it states holds; 1: something does not; 2: it cannot be read. docs/certificates.md has
the format and the proof. Decimals are fractions; the bound counts whole picoseconds, each time rounded down.
"""

import hashlib
import json
import sys
from fractions import Fraction
from operator import add

TICKS, NEVER = 10**12, 1 << 90  # in a second; later than anything


def stop_of(parts, at):
    for part in parts:
        at = stop_of(part["checkpoint"], at) if isinstance(part, dict) else at + 1
    return at


class Table:
    def __init__(self, t):
        self.options, self.makes, self.kinds, self.starts, self.stops, steps = [], [], [], [], [], []
        for block in t["groups"]:
            self.starts.append(len(steps))
            steps += [t["steps"][number] for number in t["blocks"][block]]
        self.options, self.makes = [t["options"][s["options"]] for s in steps], [s["makes"] for s in steps]
        self.bytes, self.loss, self.end, self.reads = t["state_bytes"], t["loss_bytes"], len(steps), []
        now, last = dict.fromkeys(self.bytes, -1), {}  # makers of tensors; the last reader of each version
        for k, step in enumerate(steps):
            self.reads.append([(name, now[name]) for name in step["reads"]])
            last.update(dict.fromkeys(self.reads[k], k))
            now.update(dict.fromkeys(step["makes"], k))
        self.outputs, self.alive = {(name, now[name]) for name in t["outputs"]}, [[] for _ in (*steps, 0)]
        for v, end in (last | dict.fromkeys(self.outputs, self.end)).items():
            for position in range(v[1] + 1, end + 1):
                self.alive[position].append(v)
        stops = [*self.starts[1:], self.end]
        for start, stop in zip(self.starts, stops, strict=True):  # where a checkpoint may end
            for k in range(start, stop):
                beyond = (e for e in stops if e == stop or (k == start and e > k))
                self.stops.append([*range(k + 1, stop), *beyond])
        self.live = [sum(self.bytes[name] for name, _ in some) for some in self.alive]  # gradients
        for k, step in enumerate(steps):  # equal where they cost the same on a redo
            alive = [sorted(name for name, _ in self.alive[position]) for position in (k, k + 1)]
            self.kinds.append(hash(repr((step, alive, k in self.starts))))

    def size(self, versions):  # the chain's inputs count nothing
        return sum(self.bytes[name] for name, maker in versions if maker >= 0)


class Replay:
    def __init__(self, table, schedule):
        self.t, self.peak, self.seconds, self.runs, self.tape = table, 0, 0, 0, []
        self.states = [{v[0]: v for v in table.alive[0]}]
        assert self.forward(schedule, 0, False) == table.end, "the schedule is too short"
        self.run(table.loss, 0)
        self.backward(0)

    def held(self):
        return {v for record in self.tape for v in record[3]}.union(*(s.values() for s in self.states))

    def run(self, more, seconds, entry=()):
        size = self.t.size(self.held().union(entry)) + sum(record[4] for record in self.tape)
        self.peak, self.seconds, self.runs = (
            max(self.peak, size + more),
            self.seconds + seconds,
            self.runs + 1,
        )

    def advance(self, k):
        state, made = self.states[-1], [(name, self.runs) for name in self.t.makes[k]]
        state.update((v[0], v) for v in made)
        for name in state.keys() - {name for name, _ in self.t.alive[k + 1]}:
            del state[name]
        return made

    def forward(self, parts, at, redo):  # returns the position that it leads to
        live = self.t.live[stop_of(parts, at)] if redo else 0
        for number, part in enumerate(parts):
            nested, stop = isinstance(part, dict), stop_of([part], at)
            names = {v[0] for k in range(at, stop) for v in self.t.reads[k] if v[1] < at}
            entry, option = (
                [self.states[-1][n] for n in names],
                None if nested else self.t.options[at][part[1]],
            )
            assert nested or part[0] == at, f"step {at} is missing"
            self.tape.append([part, at, entry, entry, 0])
            if nested:
                for k, strategy in zip(range(at, stop), part["discard"], strict=True):
                    option = self.t.options[k][strategy]
                    if not redo or number < len(parts) - 1:
                        self.run(option["discard_bytes"] + live, option["discard_seconds"])
                        self.advance(k)
            elif not (redo and number == len(parts) - 1 and option["in_pieces"]):
                self.run(option["forward_bytes"] + live, option["forward_seconds"])
                made = self.advance(at)
                own = [made[place] for place in option["keeps_made"]]
                self.tape[-1][3:] = entry + own, option["preserved_bytes"]
            at = stop
        return at

    def backward(self, left):
        while len(self.tape) > left:
            part, at, entry, held, _ = self.tape.pop()
            if isinstance(part, dict):
                depth = len(self.tape)
                self.states += [{v[0]: v for v in entry}, {v[0]: v for v in entry}]
                self.forward(part["checkpoint"], at, True)
                del self.states[-2:]
                self.backward(depth)
                continue
            option, own = self.t.options[at][part[1]], set(held[len(entry) :])
            more = option["backward_held_bytes"] + self.t.size(own - self.held()) if own & self.held() else 0
            self.run(max(option["backward_bytes"], more), option["backward_seconds"], entry)


class Bound:
    def __init__(self, t, budget, unit, price):
        self.t, self.unit, self.price, self.known = t, unit, price, {}
        self.length = (
            max(0, budget - t.size(t.outputs) + unit) // unit
        )  # of every list: by memory left, in units

    def flat(self, ticks, need=0):
        return [NEVER] * min(need, self.length) + [ticks] * (self.length - need)

    def recorded(self, k, b):  # what each option needs, keeps and takes
        made, left = [(name, k) for name in self.t.makes[k]], self.t.outputs if b is None else set()
        live = -self.t.size(left & set(made)) if b is None else self.t.live[b]
        for o in self.t.options[k].values():
            own = {made[place] for place in o["keeps_made"]}
            kept = o["preserved_bytes"] + self.t.size((own | set(made) & set(self.t.alive[k + 1])) - left)
            skip, seconds = k + 1 == b and o["in_pieces"], o["backward_seconds"]
            backward = max(
                o["backward_bytes"], o["backward_held_bytes"] + self.t.size(own - left) if own else 0
            )
            need = max(backward, 0 if skip else o["forward_bytes"] + live, 0 if k + 1 == b else kept)
            ticks = int(TICKS * (seconds if skip else seconds + o["forward_seconds"]))
            yield need // self.unit, 0 if k + 1 == b else kept // self.unit, ticks + self.paid(kept, b)

    def paid(self, kept, b):
        return int(TICKS * self.price * kept) if b is None else 0

    def discard(self, a, b, live):  # the least ticks of a discarding pass
        total = self.flat(0) if a + 1 == b else self.cached(self.discard, a, b - 1, live)
        held = live + self.t.size(v for v in self.t.alive[b - 1] if v[1] >= a)
        return list(map(add, total, self.cached(self.once, b - 1, b, held)))

    def once(self, k, b, held):
        best = self.flat(NEVER)
        for o in self.t.options[k].values():
            need = (held + o["discard_bytes"]) // self.unit
            best = list(map(min, best, self.flat(int(TICKS * o["discard_seconds"]), need)))
        return best

    def twice(self, a, b, live):
        return list(map(add, self.cached(self.discard, a, b, live), self.cached(self.least, a, b)))

    def cached(self, make, a, b, *more):  # equal where the steps are equal
        end = self.t.end if b is None else b
        key = make.__name__, tuple(self.t.kinds[a:end]), ~a if b is None else end - a, *more
        if key not in self.known:
            self.known[key] = make(a, b, *more)
        return self.known[key]

    def relax(self, best, then, need, kept, more):  # best[M] = min(best[M], then[M - kept] + more[M])
        for low in range(need, self.length, 64):  # all fall with M: most stretches can be skipped
            high = min(low + 64, self.length)
            if then[high - 1 - kept] + more[high - 1] < best[low]:
                moved = map(add, then[low - kept : high - kept], more[low:high])
                best[low:high] = map(min, best[low:high], moved)

    def least(self, k, b):  # the least ticks from step k on: to the end, or (on a redo) to step b; by memory
        end = self.t.end if b is None else b
        if k == end:
            return self.flat(0, self.t.loss // self.unit if b is None else 0)
        best = self.flat(NEVER)
        for need, kept, ticks in self.recorded(k, b):
            self.relax(best, self.cached(self.least, k + 1, b), need, kept, self.flat(ticks))
        for e in (e for e in self.t.stops[k] if e < end + (b is None)):
            exits = self.t.size(v for v in self.t.alive[e] if v[1] >= k and (b or v not in self.t.outputs))
            paid = self.flat(self.paid(exits, b))
            both = map(add, self.cached(self.twice, k, e, self.t.live[b] if b else 0), paid)
            kept = exits // self.unit
            self.relax(best, self.cached(self.least, e, b), kept, kept, list(both))
        return best

    def seconds(self, budget):
        ticks = self.cached(self.least, 0, None)[-1] if self.length else NEVER
        paid = TICKS * self.price * (budget - self.t.size(self.t.outputs) - self.t.loss)
        return None if ticks >= NEVER else (ticks + (-paid) // 1) / Fraction(TICKS)


def number(text):
    assert "-" not in text.lower().replace("e-", ""), f"{text} is negative"
    return Fraction(text)


def check(text, digest):
    cert = json.loads(text, parse_float=number, parse_int=lambda text: int(number(text)))
    plain = json.loads(text)
    del plain["digest"]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    assert digest == hashlib.sha256(canonical).hexdigest(), "altered since it was made"
    table, plan, budget, proof = Table(cert["table"]), cert["plan"], cert["budget_bytes"], cert["bound"]
    played = Replay(table, plan["schedule"])
    assert played.peak == plan["peak_bytes"], f"the plan's peak is {played.peak}, not {plan['peak_bytes']}"
    assert played.seconds == Fraction(plan["seconds"]), f"the plan takes {played.seconds}, not as stated"
    assert played.peak <= budget, "the plan exceeds the budget"
    proved = Bound(table, budget, proof["unit_bytes"], Fraction(proof["price"])).seconds(budget)
    stated = None if proof["seconds"] is None else Fraction(proof["seconds"])
    assert proved is None or (stated is not None and stated <= proved), f"only {proved} is proved"
    return played.seconds, stated


def main(path):
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        document = json.loads(text)
        digest = {"evoplan-certificate": document["digest"]}[document["format"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"{path}: not a certificate that can be read ({error})")
        return 2
    try:
        took, bound = check(text, digest)
    except Exception as error:
        print(f"{path}: NOT VALID: {error!r}")
        return 1
    slower = "no schedule fits" if bound is None else f"at most {float(took / bound - 1):.3%} slower than any"
    print(f"{path}: valid: {float(took):.6g} s, {slower} ({document['class']})")
    return 0


if __name__ == "__main__":
    sys.setrecursionlimit(10**6)  # one level for each step
    sys.exit(main(*sys.argv[1:2]))
