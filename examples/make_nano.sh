#!/usr/bin/env bash
# The default model from nothing but this package: demonstrations by scripted experts, their frames, an image tokenizer,
# token shards, the model, its card.
#
#     bash examples/make_nano.sh FOLDER [WORKERS]
#
# Each step goes on where it was when the script is started again. OBJECT and SPATIAL name other tasks; EPISODES,
# TOKENIZER_OPTIONS, TRAIN_OPTIONS and CARD_OPTIONS change its size.
set -euo pipefail
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?usage: make_nano.sh FOLDER [WORKERS]}
workers=${2:-2}
episodes=${EPISODES:-50}
read -ra tokenizer_options <<<"${TOKENIZER_OPTIONS:-}"
read -ra train_options <<<"${TRAIN_OPTIONS:-}"
read -ra card_options <<<"${CARD_OPTIONS:-}"

object=()
for thing in ${OBJECT:-alphabet_soup butter chocolate_pudding ketchup bbq_sauce}; do
  object+=("pick_up_the_${thing}_and_place_it_in_the_basket")
done
spatial=()
for place in ${SPATIAL:-on_the_stove next_to_the_cookie_box from_table_center}; do
  spatial+=("pick_up_the_black_bowl_${place}_and_place_it_on_the_plate")
done

make_frames() { # SUITE TASK…
  local suite=$1
  shift
  worldvla collect "$suite" --out "$out/demos/$suite" --episodes "$episodes" --workers "$workers" --tasks "$@"
  worldvla replay "$out/demos/$suite" "$out/frames/$suite" --to hdf5 --image-size 128 --cameras agentview \
    --workers "$workers"
}

make_frames libero_object "${object[@]}"
make_frames libero_spatial "${spatial[@]}"
worldvla train-tokenizer "$out/frames" --recipe nano --out "$out/images" "${tokenizer_options[@]}"
worldvla prepare "$out/frames" --replay never --image-size 128 --tokenizer "$out/images" --out "$out/data"
worldvla prepare "$out/frames" --replay never --image-size 128 --tokenizer "$out/images" --out "$out/sample_data" \
  --limit 10
worldvla train --recipe nano --data "$out/data" --tokenizer "$out/images" --out "$out/nano" "${train_options[@]}"
cp "$out/images/training.json" "$out/nano/image_tokenizer/"
python "$root/benchmarks/nano.py" "$out/nano" --frames "$out/frames" --out "$out/evaluation" \
  --card "${card_options[@]}"
