{{/* Names leave room for the longest suffix, since a Service's name has at most 63 characters. */}}
{{- define "optwatch.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 46 | trimSuffix "-" -}}
{{- end }}

{{- define "optwatch.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 46 | trimSuffix "-" -}}
{{- else if contains (include "optwatch.name" .) .Release.Name -}}
{{- .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "optwatch.name" .) | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/*
Never plain "optwatch": Kubernetes gives every pod of the namespace variables named after each Service, and those of a
Service "optwatch" include OPTWATCH_PORT=tcp://..., which the agent in a training pod would read as its own setting.
*/}}
{{- define "optwatch.serverName" -}}
{{- printf "%s-server" (include "optwatch.fullname" .) -}}
{{- end }}

{{- define "optwatch.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "optwatch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: optwatch
{{- end }}

{{- define "optwatch.serverSelector" -}}
app.kubernetes.io/name: {{ include "optwatch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{/* What the Prometheus operator's objects carry beside: kube-prometheus-stack selects by `release`. */}}
{{- define "optwatch.operatorLabels" -}}
{{- $labels := .Values.prometheusOperator.labels }}
{{- with .Values.prometheusOperator.release }}
{{- $labels = merge (dict "release" .) $labels }}
{{- end }}
{{- with $labels }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- define "optwatch.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end }}

{{- define "optwatch.serviceAccountName" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "optwatch.serverName" . -}}
{{- else -}}
default
{{- end -}}
{{- end }}

{{/* As pods reach the server. */}}
{{- define "optwatch.serviceUrl" -}}
{{- printf "http://%s.%s.svc:%d" (include "optwatch.serverName" .) .Release.Namespace (int .Values.service.port) -}}
{{- end }}

{{/* As people's browsers reach the server. */}}
{{- define "optwatch.publicUrl" -}}
{{- if .Values.publicUrl -}}
{{- trimSuffix "/" .Values.publicUrl -}}
{{- else if .Values.ingress.enabled -}}
{{- printf "%s://%s" (ternary "https" "http" (ne .Values.ingress.tlsSecret "")) .Values.ingress.host -}}
{{- else -}}
{{- include "optwatch.serviceUrl" . -}}
{{- end -}}
{{- end }}

{{- define "optwatch.alertmanagerUrls" -}}
{{- join "," .Values.alertmanagerUrls -}}
{{- end }}

{{/* The shipped files with this release's addresses: exactly what `optwatch alerts export` replaces. */}}
{{- define "optwatch.addressed" -}}
{{- .text | replace "http://optwatch:8000" (include "optwatch.publicUrl" .root) | replace "http://grafana:3000" (trimSuffix "/" .root.Values.grafanaUrl) -}}
{{- end }}

{{/* Where recordings are kept, if that has to be said: beside an SQLite file the server keeps them by itself. */}}
{{- define "optwatch.recordingsUrl" -}}
{{- if .Values.recordings.existingClaim -}}
/var/lib/optwatch/recordings
{{- else -}}
{{- .Values.recordings.url -}}
{{- end -}}
{{- end }}

{{- define "optwatch.podSecurityContext" -}}
runAsNonRoot: true
{{- range $name := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- $value := index $.Values.securityContext $name }}
{{- if not (kindIs "invalid" $value) }}
{{ $name }}: {{ int64 $value }}
{{- end }}
{{- end }}
{{- if not (kindIs "invalid" .Values.securityContext.fsGroup) }}
# Not at every start: changing the owner of a large volume takes minutes.
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "optwatch.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end }}

{{/* Ports of the Alertmanagers, as a JSON list: all that a NetworkPolicy can know of a host name. */}}
{{- define "optwatch.alertmanagerPorts" -}}
{{- $ports := list }}
{{- range .Values.alertmanagerUrls }}
{{- $url := urlParse . }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- $ports = append $ports (int $port) }}
{{- end }}
{{- $ports | uniq | toJson }}
{{- end }}
