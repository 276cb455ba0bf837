/** Prompts of the embedded model, for the chips and for the tour. */

export const CHIPS = [
  "two small red circles drifting left over a dark blue sky",
  "a large yellow star spinning on black",
  "two green squares bouncing over dark purple",
  "a large pink ring growing on grey",
];

/**
 * Four places: the prompts that follow one another there, and a seed under which they start where they
 * are well seen.
 * @type {{seed: number, prompts: string[]}[]}
 */
export const TOUR = [
  {
    seed: 129,
    prompts: [
      "two small red circles drifting left over a dark blue sky",
      "two yellow stars drifting left over a dark blue sky",
      "a large white ring growing over dark purple",
    ],
  },
  {
    seed: 46,
    prompts: [
      "a large yellow star spinning on a black background",
      "a large cyan square spinning on dark red",
      "a green triangle bouncing on grey",
    ],
  },
  {
    seed: 147,
    prompts: [
      "two green squares bouncing over dark purple",
      "two orange circles bouncing over dark green",
      "two pink rings moving up on black",
    ],
  },
  {
    seed: 100,
    prompts: [
      "a large pink ring growing on grey",
      "a blue circle moving right on dark green",
      "a red triangle spinning over dark blue",
    ],
  },
];
