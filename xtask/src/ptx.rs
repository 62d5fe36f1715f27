//! `cargo xtask ptx`: builds the kernels for the GPU, writes one PTX file an op and checks what each entry needs there.

use crate::setup::{self, DeviceCompiler};
use crate::split::Module;
use crate::{Failure, Result, fail, shell};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Options of the command.
#[derive(clap::Args, Default)]
pub struct Options {
    /// Print only this op's table
    op: Option<String>,
    /// Write nothing: compare a fresh build with the committed files byte for byte
    #[arg(long)]
    check: bool,
    /// Also write the machine code of OP (or of all ops) to target/sass
    #[arg(long)]
    sass: bool,
}

impl Options {
    /// Those of `cargo xtask test`.
    pub fn check() -> Self {
        Self { check: true, ..Self::default() }
    }
}

/// Entries that may miss the budget, each with the reason.
const BUDGET_EXCEPTIONS: &[(&str, &str)] = &[
    ("topk_gate__gate__r8v4", "its first launch takes 82 ms on an H100"),
    ("topk_gate__gate__r32", "simple code as r8v4, whose first launch takes 82 ms on an H100"),
    ("top2_sum_gate__gate__sqrtsoftplus", "the driver compiles it in 60 ms on the host of an H200"),
];

/// Most instructions of an entry. The driver compiles an entry before its first launch, which must take less than 100 ms on an H100.
/// ptxas takes 2 ms and 27 us an instruction, the driver 3.3 times that; entries of 616 to 1008 instructions were measured to take 76
/// to 110 us an instruction there. A count is the same on every machine, which a time is not.
const MAX_INSTRUCTIONS: u64 = 940;

/// Bytes of an instruction.
const INSTRUCTION_BYTES: u64 = 16;

/// The oldest GPU; newer ones run its PTX through the driver.
const GPU: &str = "sm_90";

/// Flags of every crate of the device build, the core library included.
///
/// PTX ISA 8.0 (CUDA 12.0, driver 525) is the oldest that has all instructions of the device layer; sm_90 alone gives 7.8.
///
/// rustc's own optimiser knows nothing of instructions that all threads of a warp must execute together: above level 1 its jump
/// threading copies what follows an `if` into both branches, barriers and shuffles too. LLVM's passes do know.
const FLAGS: [&str; 3] = ["-Ctarget-cpu=sm_90", "-Ctarget-feature=+ptx80", "-Zmir-opt-level=1"];

/// An entry with one barrier after an `if` that threads of a warp take differently, and how that barrier begins: the proof that a
/// compiler leaves such code in one piece.
const PROBE: (&str, &str) = ("selftest__scan", "bar.sync");

/// Kernels that exercise the device layer; their PTX belongs to the tests, not to the published package.
const SELFTEST: &str = "selftest";

/// What the PTX is made of: file name without `.ptx` to text.
type Files = BTreeMap<String, String>;

/// A folder of PTX files and its manifest.
fn folder(op: &str) -> PathBuf {
    shell::root().join(if op == SELFTEST { "tests/ptx" } else { "host/ptx" })
}

/// `cargo xtask ptx`.
pub fn run(options: &Options) -> Result {
    let wanted = committed_compiler();
    let (compiler, fresh) = build_files(wanted.as_deref())?;
    if let Some(op) = &options.op
        && !fresh.contains_key(op)
    {
        return fail(format!(
            "ptx: no op `{op}`; there are: {}",
            fresh.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
        ));
    }
    let of_another_compiler = options.check && wanted.as_ref().is_some_and(|wanted| *wanted != compiler.version);
    if of_another_compiler {
        println!(
            "ptx: comparison left out: the committed files are by {}, here is {} ({})",
            wanted.unwrap_or_default(),
            compiler.version,
            compiler.origin
        );
    } else if options.check {
        compare(&fresh, &compiler)?;
    } else {
        write(&fresh, &compiler)?;
    }
    // Another compiler's registers say nothing about the files that users get.
    let checked = if of_another_compiler { committed_files()? } else { fresh };
    let chosen: Files = checked.into_iter().filter(|(op, _)| options.op.as_ref().is_none_or(|wanted| wanted == op)).collect();
    let verdict = budget(&chosen, options.op.is_some() || !options.check);
    // The machine code is wanted most when something spills.
    if options.sass {
        sass(&chosen)?;
    }
    verdict
}

/// PTX budget of these ops from a fresh build; part of `test FILTER`.
pub fn check_ops(names: &[String]) -> Result {
    let (_, fresh) = build_files(committed_compiler().as_deref())?;
    budget(&fresh.into_iter().filter(|(op, _)| names.contains(op)).collect(), true)
}

/// Version of the compiler that made the committed files.
fn committed_compiler() -> Option<String> {
    manifest(&folder(""))?["compiler"].as_str().map(str::to_owned)
}

/// Build with this version of the compiler if it can be had.
fn build_files(wanted: Option<&str>) -> Result<(DeviceCompiler, Files)> {
    let compiler = setup::device_compiler(wanted)?;
    let module = build(&compiler)?;
    probe(&module.reached_code(PROBE.0), &compiler.version)?;
    let ops = module.ops().map_err(Failure)?;
    Ok((compiler, ops.into_iter().map(|(op, entries)| (op, module.text(&entries))).collect()))
}

/// The manifest in a folder, if there is one.
fn manifest(folder: &Path) -> Option<Value> {
    serde_json::from_str(&shell::read(&folder.join("manifest.json")).ok()?).ok()
}

/// SHA-256 of each op's committed PTX.
pub fn committed_shas() -> BTreeMap<String, String> {
    let mut shas = BTreeMap::new();
    for folder in [folder(""), folder(SELFTEST)] {
        if let Some(ops) = manifest(&folder).as_ref().and_then(|manifest| manifest["ops"].as_object()) {
            shas.extend(ops.iter().map(|(op, about)| (op.clone(), about["sha256"].as_str().unwrap_or_default().to_owned())));
        }
    }
    shas
}

/// [`FLAGS`], and those that make the output the same in every folder.
fn rustflags(compiler: &DeviceCompiler) -> Result<Vec<String>> {
    let mut flags: Vec<String> = FLAGS.map(str::to_owned).into();
    flags.push(format!("--remap-path-prefix={}=.", shell::root().display()));
    // Paths of the core library would show where the compiler is.
    let mut ask = Command::new(&compiler.rustc);
    let sysroot = shell::output(compiler.apply(&mut ask).args(["--print", "sysroot"]))?;
    flags.push(format!("--remap-path-prefix={}=/rustc", sysroot.trim()));
    Ok(flags)
}

/// Compile the kernels.
fn build(compiler: &DeviceCompiler) -> Result<Module> {
    let root = shell::root();
    // One file for each compiler and set of flags, as cargo keeps one build for each: it does not write the file again when
    // it goes back to an earlier one. Relative to the root, since the name is part of the flags.
    let identity = shell::sha256(&format!("{} {FLAGS:?}", compiler.version));
    let name = format!("target/ptx/kernels-{}.s", &identity[..8]);
    let asm = root.join(&name);
    if !asm.is_file() {
        // cargo does not know that the file is part of the build, so it has to forget the build.
        for path in shell::list(&root.join("target/ptx/nvptx64-nvidia-cuda/ptx/.fingerprint")) {
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ferrotile-kernels-")) {
                shell::remove_dir(&path)?;
            }
        }
        shell::create_dir(&root.join("target/ptx"))?;
    }
    eprintln!("building the kernels for {GPU} with {} ({})", compiler.version, compiler.origin);
    let mut cargo = shell::cargo();
    compiler
        .apply(&mut cargo)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(compiler)?.join("\x1f"))
        .args(["rustc", "--package", "ferrotile-kernels", "--features", SELFTEST, "--crate-type", "cdylib", "--profile", "ptx"])
        .args(["--target", "nvptx64-nvidia-cuda", "-Zbuild-std=core", "--target-dir", "target/ptx", "--"])
        // There is nothing to link: the assembly is what we want.
        .args([&format!("--emit=asm={name}"), "-Clinker=/bin/true"]);
    shell::run(&mut cargo)?;
    Module::parse(&shell::read(&asm)?).map_err(|why| Failure(format!("ptx: {name}: {why}")))
}

/// Fail if this compiler has copied the barrier of the probe.
fn probe(code: &str, version: &str) -> Result {
    let (entry, barrier) = PROBE;
    match code.lines().filter(|line| line.trim_start().starts_with(barrier)).count() {
        1 => Ok(()),
        0 => fail(format!("ptx: {entry} is absent or has no `{barrier}`; name another probe in xtask/src/ptx.rs")),
        n => fail(format!(
            "ptx: {entry} has 1 barrier in its source and {n} in the PTX: {version} copies barriers into branches, and the kernels it makes may hang"
        )),
    }
}

/// What the manifest says about files built now.
fn manifest_text(files: &Files, compiler: &DeviceCompiler, selftest: bool) -> String {
    let ops: BTreeMap<&str, Value> = files
        .iter()
        .filter(|(op, _)| (*op == SELFTEST) == selftest)
        .map(|(op, text)| {
            let entries = text.lines().filter(|line| line.starts_with(crate::split::ENTRY_MARK)).count();
            (op.as_str(), json!({ "sha256": shell::sha256(text), "entries": entries }))
        })
        .collect();
    let flags = [&FLAGS[..], &["-Zbuild-std=core", "--profile ptx", "--target nvptx64-nvidia-cuda"]].concat();
    let manifest = json!({
        "compiler": compiler.version,
        "flags": flags,
        "ptxas": setup::PTXAS_VERSION,
        "ops": ops,
    });
    format!("{manifest:#}\n")
}

/// Every committed file that a build of now would give, manifests included.
fn expected(files: &Files, compiler: &DeviceCompiler) -> BTreeMap<PathBuf, String> {
    let mut expected: BTreeMap<PathBuf, String> =
        files.iter().map(|(op, text)| (folder(op).join(format!("{op}.ptx")), text.clone())).collect();
    expected.insert(folder("").join("manifest.json"), manifest_text(files, compiler, false));
    if files.contains_key(SELFTEST) {
        expected.insert(folder(SELFTEST).join("manifest.json"), manifest_text(files, compiler, true));
    }
    expected
}

/// PTX files that no op has any more.
fn stale(expected: &BTreeMap<PathBuf, String>) -> Vec<PathBuf> {
    let mut files = shell::list(&folder(""));
    files.extend(shell::list(&folder(SELFTEST)));
    files.retain(|path| path.extension().is_some_and(|e| e == "ptx") && !expected.contains_key(path));
    files
}

fn write(files: &Files, compiler: &DeviceCompiler) -> Result {
    let expected = expected(files, compiler);
    for path in stale(&expected) {
        std::fs::remove_file(&path).map_err(|e| Failure(format!("cannot remove {}: {e}", path.display())))?;
        eprintln!("removed {}", path.display());
    }
    let mut written = 0;
    for (path, text) in &expected {
        written += u32::from(shell::write(path, text)?);
    }
    let bytes: usize = files.values().map(String::len).sum();
    eprintln!("{} ops, {:.1} MB of PTX; {written} files changed", files.len(), bytes as f64 / 1e6);
    Ok(())
}

/// Fail if a committed file is not what the build of now gives.
fn compare(files: &Files, compiler: &DeviceCompiler) -> Result {
    let expected = expected(files, compiler);
    let root = shell::root();
    let name = |path: &Path| path.strip_prefix(&root).unwrap_or(path).display().to_string();
    let mut differences: Vec<String> =
        stale(&expected).iter().map(|path| format!("{}: no op has this file", name(path))).collect();
    for (path, fresh) in &expected {
        match std::fs::read_to_string(path) {
            Ok(old) if old == *fresh => {}
            Ok(old) => {
                let line = old.lines().zip(fresh.lines()).take_while(|(old, fresh)| old == fresh).count() + 1;
                let show = |text: &str| text.lines().nth(line - 1).unwrap_or("(end of file)").trim().to_owned();
                differences.push(format!("{}:{line}: committed `{}`, built `{}`", name(path), show(&old), show(fresh)));
            }
            Err(_) => differences.push(format!("{}: is absent", name(path))),
        }
    }
    if differences.is_empty() {
        println!("ptx: {} files equal a fresh build", expected.len());
        return Ok(());
    }
    fail(format!("ptx: committed files differ from a fresh build; type: cargo xtask ptx\n  {}", differences.join("\n  ")))
}

/// The files in the tree.
fn committed_files() -> Result<Files> {
    let mut files = Files::new();
    for folder in [folder(""), folder(SELFTEST)] {
        for path in shell::list(&folder).into_iter().filter(|path| path.extension().is_some_and(|e| e == "ptx")) {
            files.insert(path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), shell::read(&path)?);
        }
    }
    Ok(files)
}

/// What ptxas says an entry needs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Needs {
    registers: u32,
    spill_bytes: u32,
    stack_bytes: u32,
    shared_bytes: u32,
    barriers: u32,
    instructions: u64,
}

/// Run ptxas over each file, as many at a time as there are cores; fails if an entry breaks the budget.
fn budget(files: &Files, print: bool) -> Result {
    let ptxas = setup::ptxas()?;
    let jobs: Vec<(&String, &String)> = files.iter().collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(jobs.len().max(1));
    let work = || {
        let mut done = Vec::new();
        while let Some((op, text)) = jobs.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            done.push(assemble(&ptxas, op, text).map(|report| (*op, *text, report)));
        }
        done
    };
    let mut results = Vec::new();
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for handle in handles {
            match handle.join() {
                Ok(done) => results.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let mut results = results.into_iter().collect::<Result<Vec<_>>>()?;
    results.sort_by_key(|(op, ..)| *op);
    let mut broken = Vec::new();
    let (mut worst, mut longest) = (0, 0);
    let mut num_entries = 0;
    if print {
        println!(
            "{:<64} {:>9} {:>6} {:>6} {:>7} {:>8} {:>12}",
            "entry", "registers", "spills", "stack", "shared", "barriers", "instructions"
        );
    }
    for (_, text, report) in results {
        let module = Module::parse(text).map_err(Failure)?;
        for (entry, needs) in parse_ptxas(&report)? {
            if print {
                println!(
                    "{entry:<64} {:>9} {:>6} {:>6} {:>7} {:>8} {:>12}",
                    needs.registers, needs.spill_bytes, needs.stack_bytes, needs.shared_bytes, needs.barriers, needs.instructions
                );
            }
            num_entries += 1;
            worst = worst.max(needs.registers);
            longest = longest.max(needs.instructions);
            for why in over_budget(&needs, &module.reached_code(&entry)) {
                match BUDGET_EXCEPTIONS.iter().find(|(name, _)| *name == entry) {
                    Some((_, reason)) => println!("{entry}: {why}, allowed: {reason}"),
                    None => broken.push(format!("{entry}: {why}")),
                }
            }
        }
    }
    println!(
        "ptx: {num_entries} entries through ptxas {} for {GPU}, at most {worst} registers and {longest} of {MAX_INSTRUCTIONS} instructions",
        setup::PTXAS_VERSION
    );
    if broken.is_empty() { Ok(()) } else { fail(format!("ptx: over budget:\n  {}", broken.join("\n  "))) }
}

/// What an entry does that it should not.
fn over_budget(needs: &Needs, code: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if needs.spill_bytes > 0 {
        broken.push(format!("{} bytes of registers spilled", needs.spill_bytes));
    }
    if needs.stack_bytes > 0 {
        broken.push(format!("{} bytes of local memory", needs.stack_bytes));
    }
    if needs.instructions > MAX_INSTRUCTIONS {
        broken.push(format!(
            "{} instructions, more than {MAX_INSTRUCTIONS}: the first launch may take longer than 100 ms",
            needs.instructions
        ));
    }
    for instruction in ["trap", "call"] {
        let used = code.split([';', '\n', '{', '}']).any(|one| {
            let words = one.split_whitespace().skip_while(|word| word.starts_with('@'));
            words.take(1).any(|word| word.split('.').next() == Some(instruction))
        });
        if used {
            broken.push(format!("a `{instruction}` is left (a panic, a bounds check, or a function that was not inlined)"));
        }
    }
    broken
}

/// ptxas's report on one file. What it says about a text never changes, so it is kept by the text's hash.
fn assemble(ptxas: &Path, op: &str, text: &str) -> Result<String> {
    let dir = shell::root().join("target/ptx/ptxas");
    let kept = dir.join(shell::sha256(&format!("{} {GPU} {CODE_MARK}\n{text}", setup::PTXAS_VERSION)));
    if let Ok(report) = std::fs::read_to_string(&kept) {
        return Ok(report);
    }
    let input = dir.join(format!("{op}.ptx"));
    shell::write(&input, text)?;
    // The cubin stays beside its PTX: `--sass` reads it.
    let mut command = Command::new(ptxas);
    let cubin = dir.join(format!("{op}.cubin"));
    command.args(["-v", &format!("-arch={GPU}")]).arg(&input).arg("-o").arg(&cubin);
    let out = command.output().map_err(|e| Failure(format!("{}: {e}", ptxas.display())))?;
    let mut report = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        return fail(format!("ptx: ptxas refuses {op}: {}\n{report}", shell::describe(&command)));
    }
    let code = std::fs::read(&cubin).map_err(|e| Failure(format!("cannot read {}: {e}", cubin.display())))?;
    let sizes = code_sizes(&code).ok_or_else(|| Failure(format!("ptx: {} is no ELF file", cubin.display())))?;
    for (entry, bytes) in sizes {
        report.push_str(&format!("{CODE_MARK}'{entry}' {bytes}\n"));
    }
    shell::write(&kept, &report)?;
    Ok(report)
}

/// Before an entry and the bytes of its code, which we add to ptxas's report.
const CODE_MARK: &str = "code of ";

/// Bytes of each entry's code in a cubin, which is a 64-bit little-endian ELF file with a section `.text.ENTRY` for each; the padding at
/// the end of a section counts.
fn code_sizes(elf: &[u8]) -> Option<Vec<(String, u64)>> {
    let number = |at: u64, bytes: usize| -> Option<u64> {
        let field = elf.get(usize::try_from(at).ok()?..)?.get(..bytes)?;
        Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    if !elf.starts_with(b"\x7fELF") {
        return None;
    }
    // Offset of the section headers, size of one, how many, which has the names. In a header: name, offset and size of the section.
    let (table, each, count, names) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let names = number(table + names * each + 0x18, 8)?;
    let mut sizes = Vec::new();
    for header in (0..count).map(|i| table + i * each) {
        let name = elf.get(usize::try_from(names + number(header, 4)?).ok()?..)?.split(|byte| *byte == 0).next()?;
        if let Some(entry) = std::str::from_utf8(name).ok()?.strip_prefix(".text.") {
            sizes.push((entry.to_owned(), number(header + 0x20, 8)?));
        }
    }
    Some(sizes)
}

/// Entry by entry, in the order of their names.
fn parse_ptxas(report: &str) -> Result<BTreeMap<String, Needs>> {
    let mut entries: BTreeMap<String, Needs> = BTreeMap::new();
    let mut current: Option<String> = None;
    // `N unit` pairs, whatever their order: ptxas leaves out what is 0.
    let number = |line: &str, unit: &str| -> u32 {
        let before = line.split(',').find_map(|part| part.trim().strip_suffix(unit));
        before.and_then(|before| before.trim().rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    };
    for line in report.lines() {
        let line = line.trim_end();
        if let Some(rest) = line.strip_prefix(CODE_MARK) {
            let (name, bytes) = rest.rsplit_once(' ').unwrap_or_default();
            if let Some(needs) = entries.get_mut(name.trim_matches('\'')) {
                needs.instructions = bytes.parse().unwrap_or(0) / INSTRUCTION_BYTES;
            }
        } else if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            entries.insert(name.clone(), Needs::default());
            current = Some(name);
        } else if let Some(name) = line.split("Function properties for ").nth(1) {
            // Functions that were not inlined get such lines too; what they need counts for the entry compiled at the time.
            if entries.contains_key(name) {
                current = Some(name.to_owned());
            }
        } else if let Some(needs) = current.as_ref().and_then(|name| entries.get_mut(name)) {
            if line.contains("bytes stack frame") {
                needs.stack_bytes += number(line, " bytes stack frame");
                needs.spill_bytes += number(line, " bytes spill stores") + number(line, " bytes spill loads");
            } else if line.contains("Used ") {
                needs.registers = number(line, " registers");
                needs.barriers = number(line, " barriers");
                needs.shared_bytes = number(line, " bytes smem");
                needs.stack_bytes = needs.stack_bytes.max(number(line, " bytes cumulative stack size"));
            }
        }
    }
    match entries.iter().find(|(_, needs)| needs.registers == 0) {
        Some((name, _)) => fail(format!("ptx: ptxas names no registers for {name}:\n{report}")),
        None => Ok(entries),
    }
}

/// Machine code of these ops, as text.
fn sass(files: &Files) -> Result {
    let nvdisasm = setup::nvdisasm()?;
    for (op, text) in files {
        let cubin = shell::root().join(format!("target/ptx/ptxas/{op}.cubin"));
        if !cubin.is_file() || shell::read(&cubin.with_extension("ptx")).is_ok_and(|of| of != *text) {
            // The report was kept from an earlier build; the cubin was not.
            let input = cubin.with_extension("ptx");
            shell::write(&input, text)?;
            shell::output(Command::new(setup::ptxas()?).arg(format!("-arch={GPU}")).arg(&input).arg("-o").arg(&cubin))?;
        }
        let code = shell::output(Command::new(&nvdisasm).arg("-c").arg(&cubin))?;
        let path = shell::root().join(format!("target/sass/{op}.sass"));
        shell::write(&path, &code)?;
        println!("{}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_ptxas_is_read() {
        let report = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a__one' for 'sm_90'
ptxas info    : Function properties for a__one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'a__two' for 'sm_90'
ptxas info    : Function properties for a__two
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 48 bytes cumulative stack size
ptxas info    : Compile time = 5.304 ms
code of 'a__two' 2048
code of 'a__one' 16
";
        let entries = parse_ptxas(report).unwrap();
        let one = Needs { registers: 32, shared_bytes: 1024, barriers: 1, instructions: 1, ..Needs::default() };
        let two = Needs { registers: 255, spill_bytes: 20, stack_bytes: 48, instructions: 128, ..Needs::default() };
        assert_eq!(entries, BTreeMap::from([("a__one".to_owned(), one), ("a__two".to_owned(), two)]));
        assert!(parse_ptxas(&report.replace("Used 255 registers, ", "Used ")).is_err());
    }

    #[test]
    fn code_sizes_are_read_from_the_section_headers() {
        let mut elf = vec![0; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        let names = b"\0.names\0.text.a__one\0";
        elf.extend(names);
        let table = elf.len() as u64;
        // An empty section, the names, and the code: name, offset, size.
        for (name, offset, size) in [(0u32, 0u64, 0u64), (1, 64, names.len() as u64), (8, 64, 4096)] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&offset.to_le_bytes());
            header[0x20..0x28].copy_from_slice(&size.to_le_bytes());
            elf.extend(header);
        }
        elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        elf[0x3a..0x40].copy_from_slice(&[64, 0, 3, 0, 1, 0]);
        assert_eq!(code_sizes(&elf).unwrap(), [("a__one".to_owned(), 4096)]);
        // Cut short, or something else.
        assert!(code_sizes(&elf[..elf.len() - 1]).is_some_and(|sizes| sizes.len() == 1));
        assert!(code_sizes(&elf[..table as usize + 70]).is_none());
        assert!(code_sizes(b"no ELF").is_none());
    }

    #[test]
    fn a_copied_barrier_is_seen() {
        let once = "\tbar.sync \t0;\n\tbarrier_like %r1;\n";
        assert!(probe(once, "rustc").is_ok());
        assert!(probe("", "rustc").unwrap_err().0.contains("absent"));
        assert!(probe(&once.repeat(2), "rustc 9").unwrap_err().0.contains("2 in the PTX: rustc 9"));
    }

    #[test]
    fn the_budget_sees_spills_stack_traps_and_calls() {
        let fine = Needs { registers: 32, ..Needs::default() };
        assert!(over_budget(&fine, "\tmov.u32 %r1, trap_count;\n\t// call\n\tbra $L__recall;\n").is_empty());
        assert_eq!(over_budget(&fine, "{ trap; }").len(), 1);
        assert_eq!(over_budget(&fine, "\t@%p1 trap;\n").len(), 1);
        assert_eq!(over_budget(&fine, "\tcall.uni (retval0), f, ();\n").len(), 1);
        assert_eq!(over_budget(&Needs { spill_bytes: 4, stack_bytes: 8, ..fine.clone() }, "").len(), 2);
        assert!(over_budget(&Needs { instructions: MAX_INSTRUCTIONS, ..fine.clone() }, "").is_empty());
        assert!(over_budget(&Needs { instructions: MAX_INSTRUCTIONS + 1, ..fine }, "")[0].contains("first launch"));
    }
}
