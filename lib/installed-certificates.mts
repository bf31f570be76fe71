// The certificates as a machine has them, which may be older than those in tls/ on this computer.
import { X509Certificate } from 'node:crypto'
import type { Machine } from './machine.mts'

export interface InstalledCertificate {
  /** Its file on the machine; a kubeconfig has one inside. */
  file: string
  subject: string
  expires: Date
  /** Whole days; negative if it has expired. */
  daysLeft: number
}

const home = '/var/lib/kubernetes'

/** Shell text that prints them. Certificates only: no private key leaves the machine. */
export const collect = `
cd ${home}
for file in pki/*.pem; do
  case $file in *-key.pem) continue;; esac
  echo "== $file"
  cat "$file"
done
for file in *.kubeconfig; do
  [ -e "$file" ] || continue
  echo "== $file"
  sed -n 's/^ *client-certificate-data: *//p' "$file" | tr -d '"' | base64 -d
done
`

/**
 * Reads every certificate that the machine was given.
 *
 * @param timeout seconds
 * @throws NoAnswer if the machine cannot be reached
 */
export async function installedCertificates(
  machine: Machine,
  timeout = 20,
): Promise<InstalledCertificate[]> {
  return certificatesIn(await machine.succeed(collect, { timeout }))
}

/** The certificates of what `collect` prints. A file that holds none is left out. */
export function certificatesIn(text: string): InstalledCertificate[] {
  const sections = text.split(/^== /m).slice(1)
  return sections.flatMap((section) => {
    const [file = '', ...lines] = section.split('\n')
    const pem = lines.join('\n')
    if (!pem.includes('BEGIN CERTIFICATE')) return []
    const { subject, validTo } = new X509Certificate(pem)
    const expires = new Date(validTo)
    const daysLeft = Math.floor((expires.getTime() - Date.now()) / 86_400_000)
    return { file: `${home}/${file}`, subject, expires, daysLeft }
  })
}
