//! Embeds `ptx/*.ptx` and the manifest beside them: writes a table from op name to PTX text for `src/ptx.rs` to include.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=ptx");
    let root = env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?;
    let folder = Path::new(&root).join("ptx");

    let mut ops = Vec::new();
    if folder.is_dir() {
        for file in fs::read_dir(&folder)? {
            let path = file?.path();
            if path.extension().is_some_and(|e| e == "ptx") {
                let op = path
                    .file_stem()
                    .and_then(|s| s.to_str())
                    .ok_or_else(|| io::Error::other("the name of a PTX file is not UTF-8"))?;
                ops.push((op.to_owned(), path));
            }
        }
    }
    ops.sort();

    let mut code = String::from("/// Op and PTX text of every file in `ptx/`.\nstatic EMBEDDED: &[(&str, &str)] = &[\n");
    for (op, path) in &ops {
        let _ = writeln!(code, "    ({op:?}, include_str!({path:?})),");
    }
    code.push_str("];\n");

    let manifest = folder.join("manifest.json");
    code.push_str("/// `ptx/manifest.json`, or an empty object.\npub const MANIFEST: &str = ");
    if manifest.is_file() {
        let _ = writeln!(code, "include_str!({manifest:?});");
    } else {
        code.push_str("\"{}\";\n");
    }
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    fs::write(Path::new(&out).join("ptx.rs"), code)
}
