//! Paths of the workspace, and running other programs with errors that say what to type.

use crate::{Failure, Result, fail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The workspace's root folder.
pub fn root() -> PathBuf {
    // cargo sets the variable anew at every run, so a checkout that was moved is still found.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// Where setup puts its tools. Not the target directory of cargo's environment: tools are per checkout.
pub fn device_dir() -> PathBuf {
    root().join("target/device")
}

/// cargo, in the root folder, of the toolchain that runs this.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// The folder cargo builds into.
pub fn target_dir() -> Result<PathBuf> {
    let text = output(cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| Failure(format!("cargo metadata: {e}")))?;
    match json["target_directory"].as_str() {
        Some(dir) => Ok(dir.into()),
        None => fail("cargo metadata names no target_directory"),
    }
}

/// The command as a person would type it: changed environment first.
pub fn describe(command: &Command) -> String {
    let quote = |text: &std::ffi::OsStr| {
        let text = text.to_string_lossy().into_owned();
        if text.is_empty() || text.contains([' ', '$', '\'', '"', '*']) {
            format!("'{}'", text.replace('\'', r"'\''"))
        } else {
            text
        }
    };
    let mut words: Vec<String> = command
        .get_envs()
        .filter_map(|(name, value)| value.map(|value| format!("{}={}", name.to_string_lossy(), quote(value))))
        .collect();
    let program = Path::new(command.get_program());
    words.push(
        program.file_name().filter(|name| *name == "cargo").unwrap_or(command.get_program()).to_string_lossy().into_owned(),
    );
    words.extend(command.get_args().map(quote));
    words.join(" ")
}

fn not_started(command: &Command, error: &std::io::Error) -> Failure {
    Failure(format!("{} could not be started: {error}", command.get_program().to_string_lossy()))
}

/// Run with this terminal's input and output; a bad exit is an error that names the command.
pub fn run(command: &mut Command) -> Result {
    let status = command.status().map_err(|e| not_started(command, &e))?;
    if status.success() { Ok(()) } else { fail(format!("failed ({status}): {}", describe(command))) }
}

/// Run and return what it prints; a bad exit is an error with what it wrote to stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().map_err(|e| not_started(command, &e))?;
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        let stderr = String::from_utf8_lossy(&out.stderr);
        fail(format!("failed ({}): {}\n{}", out.status, describe(command), stderr.trim_end()))
    }
}

/// Whether a program of this name is in PATH.
pub fn has_program(name: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

/// Read a text file; the error names it.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Failure(format!("cannot read {}: {e}", path.display())))
}

/// Write a text file and its folder, but leave it alone when nothing changed, so that cargo rebuilds nothing.
/// Says whether it wrote.
pub fn write(path: &Path, text: &str) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    if let Some(dir) = path.parent() {
        create_dir(dir)?;
    }
    fs::write(path, text).map_err(|e| Failure(format!("cannot write {}: {e}", path.display())))?;
    Ok(true)
}

/// Make a folder and its parents.
pub fn create_dir(path: &Path) -> Result {
    fs::create_dir_all(path).map_err(|e| Failure(format!("cannot make {}: {e}", path.display())))
}

/// Remove a folder with all that is in it; one that is absent is fine.
pub fn remove_dir(path: &Path) -> Result {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => fail(format!("cannot remove {}: {e}", path.display())),
        _ => Ok(()),
    }
}

/// Move a finished folder to its place. Whoever made the same folder in the meantime wins.
pub fn publish(partial: &Path, done: &Path) -> Result {
    if done.exists() {
        return remove_dir(partial);
    }
    fs::rename(partial, done).map_err(|e| Failure(format!("cannot move {} to {}: {e}", partial.display(), done.display())))
}

/// The entries of a folder by name; none when there is no such folder.
pub fn list(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    paths.sort();
    paths
}

/// Hex SHA-256.
pub fn sha256(text: &str) -> String {
    use sha2::Digest;
    format!("{:x}", sha2::Sha256::digest(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_described_as_typed() {
        let mut command = Command::new("/opt/bin/cargo");
        command.args(["test", "two words"]).env("A", "b c").env_remove("GONE");
        assert_eq!(describe(&command), "A='b c' cargo test 'two words'");
    }

    #[test]
    fn a_failed_command_is_named() {
        let Failure(text) = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(text.contains("sh -c 'echo why >&2; exit 3'") && text.ends_with("why"), "{text}");
        let Failure(text) = run(&mut Command::new("no-such-program")).unwrap_err();
        assert!(text.starts_with("no-such-program could not be started"), "{text}");
    }

    #[test]
    fn sha256_of_abc() {
        assert_eq!(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
