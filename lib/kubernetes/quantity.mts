// Amounts as Kubernetes writes them: "250m", "1024Ki", "2".

const factors: Readonly<Record<string, number>> = {
  ...{ n: 1e-9, u: 1e-6, m: 1e-3, '': 1 },
  ...{ k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 },
  ...{ Ki: 2 ** 10, Mi: 2 ** 20, Gi: 2 ** 30, Ti: 2 ** 40, Pi: 2 ** 50, Ei: 2 ** 60 },
}

/**
 * The number of a quantity (k8s.io/apimachinery/pkg/api/resource): cores of "250m", bytes of
 * "1024Ki"; undefined if it is none.
 */
export function parseQuantity(text: string): number | undefined {
  const [, digits, suffix = ''] =
    text.match(/^([+-]?[\d.]+(?:[eE][+-]?\d+)?)([numkMGTPE]|[KMGTPE]i)?$/) ?? []
  const factor = factors[suffix]
  const number = Number(digits)
  return factor === undefined || Number.isNaN(number) ? undefined : number * factor
}
