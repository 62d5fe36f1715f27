"""Loads that wait for another load without need, by kernel, in the machine code that ptxas makes of host/ptx.

    late_loads.py [OP ...]      # after `cargo xtask setup`; without an op, all

A line names a kernel, its instructions and loads, and the addresses of those loads that on every path come after an instruction that waits for
an earlier load, though their address does not depend on one. Each may cost a whole memory latency. Tails, second passes and paths that are
never taken are listed too: look at the code (`nvdisasm -c`) before changing anything. docs/performance.md says what helps.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'target/device/cuda/nvidia/cu13/bin'
INSTRUCTION = re.compile(r'\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?PT?\d*) )?\s*([A-Z0-9_.]+)\s*(.*?);')


def machine_code(ptx):
    with tempfile.NamedTemporaryFile(suffix='.cubin') as cubin:
        subprocess.run([TOOLS / 'ptxas', '-arch=sm_90', ptx, '-o', cubin.name], check=True)
        return subprocess.run([TOOLS / 'nvdisasm', '-c', cubin.name], check=True, capture_output=True, text=True).stdout


def registers(text, count=1):
    """Registers that a text names, each with those behind it that belong to a value of `count`."""
    return {f'{kind}{int(number) + i}' for kind, number in re.findall(r'\b(U?R)(\d+)\b', text) for i in range(count)}


def width(op):
    return 4 if '.128' in op else 2 if '.64' in op or '.WIDE' in op else 1


def blocks_of(code):
    """Basic blocks, each a list of (address, predicate, operation, operands), and the block that a label starts."""
    blocks, current, labels = [], [], {}
    for line in code.split('\n'):
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            if current:
                blocks.append(current)
                current = []
            labels[label[1]] = len(blocks)
        elif instruction := INSTRUCTION.match(line):
            current.append(instruction.groups())
            if instruction[3].startswith(('BRA', 'EXIT', 'RET', 'BRX')):
                blocks.append(current)
                current = []
    return blocks + [current] if current else blocks, labels


def predecessors(blocks, labels):
    """Of each block, without the edges of loops. None is the entry."""
    before = [[] for _ in blocks]
    before[0].append(None)
    for i, block in enumerate(blocks):
        _, predicate, op, operands = block[-1]
        target = re.search(r'\((\.L_x_\d+)\)', operands)
        # The other way of a divergent branch only brings the warp together.
        jumps = op.startswith('BRA') and 'DIV' not in op
        if jumps and target and labels.get(target[1], 0) > i:
            before[labels[target[1]]].append(i)
        always = not predicate and not re.match(r'!?U?P\d', operands)
        if not ((jumps or op == 'EXIT') and always) and i + 1 < len(blocks):
            before[i + 1].append(i)
    return before


def late_loads(code):
    blocks, labels = blocks_of(code)
    before = predecessors(blocks, labels)
    # Registers under way, registers that depend on a load, and whether every path here has waited.
    states = {None: (set(), set(), False)}
    late, loads = [], 0
    for i, block in enumerate(blocks):
        known = [states[p] for p in before[i] if p in states]
        if not known:
            continue
        pending = set().union(*(state[0] for state in known))
        tainted = set().union(*(state[1] for state in known))
        waited = all(state[2] for state in known)
        for address, predicate, op, operands in block:
            parts = [part.strip() for part in operands.split(',')]
            if op.startswith('LDG') and '[' in operands:
                loads += 1
                source = re.sub(r'desc\[.*?\]', '', operands[operands.index('['):])
                if waited and not registers(source, 2) & tainted:
                    late.append(address)
                loaded = registers(parts[0], width(op.replace('desc', '')))
                pending |= loaded
                tainted |= loaded
                continue
            if op.startswith(('ST', 'RED', 'BRA', 'EXIT', 'BAR')):
                sources, results = registers(operands), set()
            else:
                first = next((n for n, part in enumerate(parts) if not re.match(r'U?P(T|\d)$', part)), len(parts))
                is_register = first < len(parts) and re.match(r'U?R\d+', parts[first])
                results = registers(parts[first], width(op)) if is_register else set()
                sources = registers(','.join(parts[first + 1:] if is_register else parts))
            if sources & pending:
                waited = True
                pending -= sources
            pending -= results
            if sources & tainted:
                tainted |= results
            elif not predicate:
                tainted -= results
        states[i] = (pending, tainted, waited)
    return sum(map(len, blocks)), loads, late


ops = sys.argv[1:] or sorted(path.stem for path in (ROOT / 'host/ptx').glob('*.ptx'))
for op in ops:
    text = machine_code(ROOT / f'host/ptx/{op}.ptx')
    for kernel in re.finditer(r'^\.text\.(\S+):\n(.*?)(?=^//---|\Z)', text, re.S | re.M):
        instructions, loads, late = late_loads(kernel[2])
        if late:
            print(f'{kernel[1]:84s} {instructions:4d} instructions, {loads:2d} loads, {len(late):2d} late: {" ".join(late[:8])}')
