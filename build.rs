//! Tells the crate whether the default voice is here to be built in (`cfg(embedded_voice)`).

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=voices");
    println!("cargo::rustc-check-cfg=cfg(embedded_voice)");
    let voice = Path::new("voices/lj");
    if voice.join("config.json").is_file() && voice.join("model.safetensors").is_file() {
        println!("cargo::rustc-cfg=embedded_voice");
    }
}
