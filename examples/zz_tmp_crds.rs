//! tmp
fn main() {
    domicile::api::crds::write_dir(std::path::Path::new("crds")).unwrap();
}
