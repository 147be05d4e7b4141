"""Check a certificate with the standard library alone: python tools/check_certificate.py CERTIFICATE.json

Exit code 0: it holds; 1: it does not; 2: it cannot be read. docs/certificates.md has format and proof.
Decimals are fractions, none below zero ("+-1" is no number); times are rounded down to whole picoseconds.
"""

import hashlib
import json
import sys
from fractions import Fraction
from itertools import accumulate
from operator import add
from pathlib import Path

TICKS, NEVER = 10**12, 1 << 90  # in a second; later than anything


class Chain:  # versions of tensors are (name, maker); the chain's inputs are made by -1 and count nothing
    def __init__(self, t):
        self.steps = [t["steps"][number] for block in t["groups"] for number in t["blocks"][block]]
        self.cuts = {0, *accumulate(len(t["blocks"][block]) for block in t["groups"])}  # between blocks
        self.offers, self.end = [t["options"][step["options"]] for step in self.steps], len(self.steps)
        self.bytes, self.loss, self.kinds, self.alive, known = t["state_bytes"], t["loss_bytes"], "", [], {}
        self.peak = self.seconds = self.runs = 0
        self.tape, self.results, self.beside = [], set(), set()  # held by parts; by the end; all the time
        now, names = dict.fromkeys(self.bytes, -1), [set(t["outputs"])]  # makers; what is alive at each place
        for step in reversed(self.steps):
            names.insert(0, names[0].difference(step["makes"]).union(step["reads"]))
        for k, step in enumerate((*self.steps, {"makes": ()})):
            self.alive.append({(name, now[name]) for name in names[k]})
            now.update(dict.fromkeys(step["makes"], k))
            key = repr((step, sorted(names[k]), *map(sorted, names[k + 1 : k + 2]), k in self.cuts))
            self.kinds += chr(known.setdefault(key, k))  # equal steps are equal letters
        self.live = [sum(self.bytes[name] for name in some) for some in names]  # gradients

    def size(self, versions):
        return sum(self.bytes[name] for name, maker in versions if maker >= 0)

    def run(self, more, seconds, versions):
        more += self.size(self.beside.union(versions, *(held for held, _ in self.tape)))
        self.peak = max(self.peak, more + sum(kept for _, kept in self.tape))
        self.seconds, self.runs = self.seconds + seconds, self.runs + 1

    def train(self, parts, at, b, state):  # forward from `at` to the end (or to b, on a redo), and back
        if not parts:
            assert at == (b or self.end), "steps are missing"
            self.beside = self.results = self.results if b else set(state.values())
            return None if b else self.run(self.loss, 0, ())
        (part, *rest), nested, live = parts, isinstance(parts[0], dict), 0 if b is None else self.live[b]
        chosen, kind = (part["discard"], "discard") if nested else (part[1:], "forward")
        steps = [(k, self.offers[k][strategy]) for k, strategy in enumerate(chosen, at)]
        needs = [v for k, _ in steps for v in self.alive[k] if v[1] < at and v[0] in self.steps[k]["reads"]]
        entry, own, last, ends = {state[n] for n, _ in needs}, set(), steps[-1][1], not (b is None or rest)
        self.tape.append((entry, 0))
        for k, o in steps if not ends or (last["ending"] and not nested) else ():
            run = last["ending"] if ends else o
            self.run(run[kind + "_bytes"] + live, run[kind + "_seconds"], state.values())
            made, alive = [(name, self.runs) for name in self.steps[k]["makes"]], dict(self.alive[k + 1])
            state = {name: v for name, v in (state | {v[0]: v for v in made}).items() if name in alive}
            if not nested:
                own = {made[place] for place in o["keeps_made"]}
                self.tape[-1] = own.union(entry), o["preserved_bytes"]
        self.train(rest, at + len(steps), b, state)
        self.tape.pop()
        if nested:
            self.beside = self.results.union(entry)
            return self.train(part["checkpoint"], at, at + len(steps), {v[0]: v for v in entry})
        assert part[0] == at, f"step {at} is missing"
        lost = own.difference(self.beside, *(held for held, _ in self.tape))
        need, held = last["first_backward_bytes" if b is None else "backward_bytes"]
        self.run(max(need, held + self.size(lost) if lost != own else 0), last["backward_seconds"], entry)

    def bound(self, budget, unit, price):  # lists are by memory left, in units; times are ticks
        self.unit, self.price, self.known, room = unit, price, {}, budget - self.size(self.alive[-1])
        self.length = max(0, room // unit + 1)
        ticks = self.cached(self.least, 0, None)[-1] if self.length else NEVER
        return None if ticks >= NEVER else Fraction(ticks + -TICKS * price * (room - self.loss) // 1, TICKS)

    def cached(self, make, a, b, live=0):  # equal where the steps are equal
        key = make.__name__, self.kinds[a:b], b is None, live
        if key not in self.known:
            self.known[key] = make(a, b, live)
        return self.known[key]

    def flat(self, seconds, need=0):
        need = min(need // self.unit, self.length)
        return [NEVER] * need + [int(TICKS * seconds)] * (self.length - need)

    def discard(self, a, b, live):
        held = live + self.size(v for v in self.alive[b - 1] if v[1] >= a)
        offers = [(o["discard_seconds"], held + o["discard_bytes"]) for o in self.offers[b - 1].values()]
        best = [min(ticks) for ticks in zip(*(self.flat(*offer) for offer in offers), strict=True)]
        return best if a + 1 == b else list(map(add, best, self.cached(self.discard, a, b - 1, live)))

    def least(self, k, b, _):  # from step k to the end, or (on a redo) to step b
        end, done, live = (self.end + 1, self.alive[-1], 0) if b is None else (b, set(), self.live[b])
        if k == (b or self.end):
            return self.flat(0, self.loss if b is None else 0)
        best, ways, made = [NEVER] * self.length, [], [(name, k) for name in self.steps[k]["makes"]]
        for o in self.offers[k].values():
            own, last = {made[place] for place in o["keeps_made"]}, k + 1 == b
            kept = 0 if last else o["preserved_bytes"] + self.size((own | {*made} & self.alive[k + 1]) - done)
            need, held = o["first_backward_bytes" if b is None else "backward_bytes"]
            need, seconds = max(need, held + self.size(own - done) if own else 0, kept), o["backward_seconds"]
            if forward := o["ending"] if last else o:
                need = max(need, forward["forward_bytes"] + live - self.size(done.intersection(made)))
                seconds += forward["forward_seconds"]
            ways.append((k + 1, need, kept, self.flat(seconds, need)))
        for e in range(k + 1, end):
            if {k, e} <= self.cuts or self.cuts.isdisjoint(range(k + 1, e)):  # whole blocks, or inside one
                kept = self.size(v for v in self.alive[e] - done if v[1] >= k)
                passes = self.cached(self.discard, k, e, live), self.cached(self.least, k, e)
                ways.append((e, kept, kept, list(map(add, *passes))))
        for e, need, kept, more in ways:  # best[M] = min(best[M], then[M - kept] + more[M] + paid)
            then, paid = self.cached(self.least, e, b), int(TICKS * self.price * kept) if b is None else 0
            need, shift = need // self.unit, kept // self.unit
            if need < self.length and then[-1 - shift] + more[-1] + paid < best[need]:
                some = map(add, then[need - shift : self.length - shift], more[need:])
                best[need:] = map(min, best[need:], [ticks + paid for ticks in some])
        return best


def main(path):
    code, said = 2, "not a certificate that can be read"
    try:
        plain = json.loads(text := Path(path).read_text(encoding="utf-8"), parse_constant=int)  # no NaN
        digest = {"evoplan-certificate": plain.pop("digest")}[plain["format"]]
        code, said = 1, "NOT VALID"
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
        assert digest == hashlib.sha256(canonical).hexdigest(), "altered since it was made"
        cert = json.loads(text, parse_float=lambda x: Fraction("+" + x), parse_int=lambda x: int("+" + x))
        chain, plan, budget, bound = Chain(cert["table"]), cert["plan"], cert["budget_bytes"], cert["bound"]
        chain.train(plan["schedule"], 0, None, {v[0]: v for v in chain.alive[0]})
        took, stated, found = Fraction(plan["seconds"]), bound["seconds"], (chain.peak, chain.seconds)
        assert found == (min(plan["peak_bytes"], budget), took), f"the plan takes {found}"
        proved = chain.bound(budget, bound["unit_bytes"], Fraction("+" + bound["price"]))
        assert proved is None or Fraction("+" + stated) <= proved, f"only {proved} is proved"
        gap = f"at most {float(took / Fraction(stated) - 1):.3%} slower than any" if stated else "no bound"
        code, said = 0, f"valid: {float(took):.6g} s, {gap} ({cert['class']!r})"
    except Exception as error:
        said += f" ({error!r})"
    print(f"{path}: {said}")
    return code


if __name__ == "__main__":
    __debug__ or sys.exit("python -O leaves out the checks: run it without")
    sys.setrecursionlimit(10**6)  # one level for each step
    sys.exit(max(map(main, sys.argv[1:]), default=2) if sys.argv[1:] else print(__doc__) or 2)
