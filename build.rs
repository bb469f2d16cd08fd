//! Tells the crate whether the voices are here to be built in (`cfg(embedded_voice)`).

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=voices");
    println!("cargo::rustc-check-cfg=cfg(embedded_voice)");
    let whole = |voice: &str| {
        ["config.json", "model.safetensors"].iter().all(|file| Path::new("voices").join(voice).join(file).is_file())
    };
    if whole("lj") && whole("lj-live") {
        println!("cargo::rustc-cfg=embedded_voice");
    }
}
