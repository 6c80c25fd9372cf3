#!/bin/sh
# Compiles the Core ML packages beside this script. On a Mac with Xcode:
#
#   sh compile.sh                  into Resources/, which Apple's Swift package (StableDiffusionSample) reads
#   sh compile.sh --mochi          and copies that to Mochi Diffusion's models
#   sh compile.sh --diffusers-app  and packs it as the Diffusers app wants it
set -eu
cd -- "$(dirname -- "$0")"
name='@NAME@'
variant='@VARIANT@'

case "${1-}" in
'' | --mochi | --diffusers-app) ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' compile.sh
    [ "$1" = --help ] || { echo "$1 is none of these" >&2 && exit 2; }
    exit 0
    ;;
esac

if ! xcrun --find coremlcompiler > /dev/null 2>&1; then
    echo "coremlcompiler is not here: it comes with Xcode, on a Mac" >&2
    exit 1
fi

compile() { # package, its name in Resources/
    [ -d "$1" ] || { echo "$1 is not here any more: export again, with --bundle-resources-for-swift-cli" >&2 && exit 1; }
    compiled="Resources/$(basename "$1" .mlpackage).mlmodelc"
    rm -rf -- "$compiled" "Resources/$2.mlmodelc"
    xcrun coremlcompiler compile "$1" Resources
    mv -- "$compiled" "Resources/$2.mlmodelc"
    echo "Resources/$2.mlmodelc"
}

@COMPILE@
case "${1-}" in
--mochi)
    models="$HOME/MochiDiffusion/models/$name"
    mkdir -p -- "$models"
    for network in Unet ControlledUnet; do
        if [ -e "Resources/$network.mlmodelc" ] || [ -e "Resources/${network}Chunk1.mlmodelc" ]; then
            rm -rf -- "$models/$network.mlmodelc" "$models/${network}Chunk1.mlmodelc" "$models/${network}Chunk2.mlmodelc"
        fi
    done
    cp -R Resources/. "$models"
    echo "$models"
    ;;
--diffusers-app)
    packed="${name}_${variant}"
    rm -rf -- "$packed" "$packed.zip"
    cp -R Resources "$packed"
    zip -qr "$packed.zip" "$packed"
    rm -rf -- "$packed"
    echo "$packed.zip"
    ;;
esac
